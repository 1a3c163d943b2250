"""Paths: URLs, special files and outputs that cannot be written are refused."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

import mdt_jax
from mdt_jax.errors import SettingError, reason_of_machine
from mdt_jax.paths import (
  any_path,
  expand_home,
  input_file,
  local_path,
  output_file,
  output_folder,
)

URLS = ["gs:/bucket", "s3://b/x", "file:///tmp/x", "https://x.org"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("check", [local_path, input_file, output_file, output_folder])
def test_url_is_refused(tmp_path, monkeypatch, check, url):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SettingError) as error:
    check("--workdir", url)
  assert (error.value.setting, error.value.value) == ("--workdir", url)
  assert list(tmp_path.iterdir()) == []


def test_unknown_user_is_part_of_the_name():
  assert str(expand_home("~nosuchuser/x")) == "~nosuchuser/x"
  assert expand_home("~/x") == Path.home() / "x"


def test_only_one_function_expands_the_home_folder():
  """`Path.expanduser` raises RuntimeError for an unknown user."""
  package = Path(mdt_jax.__file__).parent
  using = [p.name for p in package.rglob("*.py") if ".expanduser()" in p.read_text()]
  assert using == []


@pytest.mark.parametrize("name", ["tfds:mnist", "a:b", "C:x", "runs/a:b"])
def test_colon_in_a_local_path_is_accepted(name):
  assert str(local_path("path", name)) == name


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 5000, "y/" * 3000, "z" * 300])
@pytest.mark.parametrize("check", [output_file, output_folder])
def test_text_that_cannot_be_a_path_is_refused(check, text):
  with pytest.raises(SettingError) as error:
    check("path", text)
  assert len(str(error.value)) < 300


def test_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert output_folder("path", "~/run") == tmp_path / "run"


def test_outputs_need_not_exist_and_are_not_created(tmp_path):
  assert output_folder("path", tmp_path / "a" / "b") == tmp_path / "a" / "b"
  assert output_file("path", tmp_path / "c" / "d.json") == tmp_path / "c" / "d.json"
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def special(tmp_path):
  """A folder with a file, a folder, a FIFO and a link to nothing."""
  (tmp_path / "file").write_text("precious")
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / "fifo")
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  return tmp_path


@pytest.mark.parametrize("name", ["file", "fifo", "file/below", "dangling", "fifo/x"])
def test_output_folder_that_cannot_be_one_is_refused(special, name):
  with pytest.raises(SettingError):
    output_folder("path", special / name)


@pytest.mark.parametrize("name", ["folder", "fifo", "file/below", "new/"])
def test_output_file_that_cannot_be_one_is_refused(special, name):
  with pytest.raises(SettingError):
    output_file("path", f"{special}/{name}")


@pytest.mark.parametrize("name", ["folder", "fifo", "file/below", "dangling", "new"])
def test_input_that_is_no_file_is_refused(special, name):
  with pytest.raises(SettingError):
    input_file("path", special / name)
  assert input_file("path", special / "file") == special / "file"


def test_device_is_refused_as_output():
  with pytest.raises(SettingError):
    output_file("path", os.devnull)


def test_unwritable_folder_is_refused(tmp_path):
  folder = tmp_path / "locked"
  folder.mkdir()
  folder.chmod(0o500)
  if os.access(folder, os.W_OK):  # root may write everywhere but to /proc
    folder = "/proc/self"
  with pytest.raises(SettingError):
    output_folder("path", f"{folder}/run")
  with pytest.raises(SettingError):
    output_file("path", f"{folder}/plan.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("check", [output_file, output_folder])
def test_error_of_a_full_disk_is_named(tmp_path, monkeypatch, check, number):
  def fail(**options):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(tempfile, "TemporaryFile", fail)
  with pytest.raises(SettingError, match="its disk is full"):
    check("path", tmp_path / "new")


@pytest.mark.parametrize(
  ("error", "text"),
  [
    (OSError(errno.ENOSPC, "", "a.npz"), "a.npz: No space left on device"),
    (MemoryError("Unable to allocate 7 TiB"), "Unable to allocate 7 TiB"),
    (FileNotFoundError(errno.ENOENT, "", "a.npz"), None),
    (ValueError("other"), None),
  ],
)
def test_fault_of_the_machine_is_described(error, text):
  found = reason_of_machine(error)
  assert found is None if text is None else text in found


def test_mounted_full_disk_is_named(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", str(tmp_path)]
  try:
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    mounted = False
  if not mounted:
    pytest.skip("takes the right to mount a file system")
  try:
    (tmp_path / "last").touch()
    with pytest.raises(SettingError, match="its disk is full"):
      output_folder("path", tmp_path / "run")
  finally:
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("path", ["s3://a/b", "gs:/a/b", "GS://a/b"])
def test_address_of_another_kind_is_told_of_buckets(path):
  with pytest.raises(SettingError, match="or one of a bucket: gs://BUCKET/NAME"):
    any_path("workdir", path)
