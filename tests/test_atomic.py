"""Atomic writes: a file is replaced as a whole or not at all. Reading of JSON files."""

import json
import os
import tracemalloc

import pytest

from mdt_jax.atomic import atomic_write, read_json, write_json
from mdt_jax.errors import SettingError


def test_failed_write_leaves_the_file_unchanged(tmp_path):
  path = tmp_path / "new" / "file"
  with atomic_write(path) as partial:
    partial.write_text("before")
  with pytest.raises(OSError, match="full"), atomic_write(path) as partial:
    partial.write_text("half")
    raise OSError("full")
  assert path.read_text() == "before"
  assert list(path.parent.iterdir()) == [path]


def test_two_writers_may_write_json_at_the_same_time(tmp_path, monkeypatch):
  path = tmp_path / "file.json"
  replace = os.replace

  def replace_after_another(*paths):
    monkeypatch.setattr(os, "replace", replace)
    write_json(path, "another")
    replace(*paths)

  monkeypatch.setattr(os, "replace", replace_after_another)
  write_json(path, "one")
  assert json.loads(path.read_text()) == "one"
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
def test_contents_reach_the_disk_before_the_name_and_then_the_folder(
  tmp_path, monkeypatch
):
  calls = []

  def fsync(descriptor):
    calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))

  def replace(source, target):
    calls.append("rename")

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(os, "replace", replace)
  with atomic_write(tmp_path / "file") as partial:
    partial.write_text("text")
  assert calls == [str(partial), "rename", str(tmp_path)]


def read(path, **options):
  return read_json(path, lambda text: SettingError("path", "x", text), **options)


def test_json_is_read_back_through_a_link(tmp_path):
  write_json(tmp_path / "file.json", {"name": "caf\udce9", "sizes": [1, 2]})
  (tmp_path / "link.json").symlink_to("file.json")
  assert read(tmp_path / "link.json") == {"name": "caf\udce9", "sizes": [1, 2]}


def test_missing_json_is_no_damaged_json(tmp_path):
  with pytest.raises(FileNotFoundError):
    read(tmp_path / "file.json")


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"{",
    b"[]",
    b'{"a": "\xff"}',
    '{"a": 1}'.encode("utf-16"),
    b'{"a": ' + b"[" * 200_000,
    b'{"a": ' + b"1" * 5_000 + b"}",
    b"{}" + b" " * 99,
  ],
  ids=["empty", "half", "list", "latin", "utf-16", "deep", "digits", "large"],
)
def test_damaged_json_is_refused_in_one_line(tmp_path, content):
  (tmp_path / "file.json").write_bytes(content)
  with pytest.raises(SettingError, match=r"file\.json ") as caught:
    read(tmp_path / "file.json", max_bytes=100 if b"  " in content else 2**20)
  assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_json_must_be_a_regular_file(tmp_path, kind):
  path = tmp_path / "file.json"
  if kind == "folder":
    path.mkdir()
  elif kind == "pipe":
    os.mkfifo(path)
  else:
    path.symlink_to("/dev/zero")
  with pytest.raises(SettingError, match=r"file\.json cannot be read: "):
    read(path)


def test_small_json_takes_little_memory(tmp_path):
  write_json(tmp_path / "file.json", {})
  tracemalloc.start()
  read(tmp_path / "file.json")
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**20
