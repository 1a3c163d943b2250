"""Checksums of a checkpoint: every damage to every file is found."""

import os

import pytest
from etils import epath

from mdt_jax.checkpoints import checksums
from mdt_jax.errors import DataUnavailable

FILES = {"state/d/0": b"\0" * 5000, "state/meta": b"{}", "config/metadata": b"seed"}


@pytest.fixture
def folder(tmp_path):
  for name, data in FILES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  checksums.write_checksums(tmp_path)
  return tmp_path


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


DAMAGES = {
  "flipped": flip,
  "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
  "emptied": lambda path: path.write_bytes(b""),
  "deleted": lambda path: path.unlink(),
}


def test_undamaged_checkpoint_passes(folder):
  assert checksums.damage(folder) is None


@pytest.mark.parametrize("name", [*FILES, checksums.FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_the_damaged_file(folder, name, damage):
  DAMAGES[damage](folder / name)
  assert checksums.damage(folder).startswith(name)


@pytest.mark.parametrize("name", [*FILES, checksums.FILE, "unlisted"])
def test_pipe_is_named_and_not_read(folder, name):
  (folder / name).unlink(missing_ok=True)
  os.mkfifo(folder / name)
  assert checksums.damage(folder, items=("ema",)).startswith(f"{name} is not a file")


def test_every_byte_of_the_checksums_file_is_protected(folder):
  path = folder / checksums.FILE
  whole = path.read_bytes()
  for place in range(len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(bytes(damaged))
    assert checksums.damage(folder) is not None, place


def test_folder_without_checksums_is_unfinished(tmp_path):
  assert "not finished" in checksums.damage(tmp_path)


def test_bucket_that_does_not_answer_is_no_damage(bucket, monkeypatch):
  folder = epath.Path(bucket)
  (folder / "ema").write_bytes(b"x")
  checksums.write_checksums(folder)
  assert checksums.damage(folder) is None

  def refuse(path):
    raise TimeoutError

  monkeypatch.setattr(type(folder), "read_bytes", refuse)
  with pytest.raises(DataUnavailable, match="does not answer"):
    checksums.damage(folder)


def test_read_error_that_may_pass_is_no_damage(folder, monkeypatch):
  def fail(path):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(checksums, "_read", fail)
  with pytest.raises(OSError, match="Input/output error"):
    checksums.damage(folder)


def test_folder_in_place_of_the_checksums_is_damage(folder):
  (folder / checksums.FILE).unlink()
  (folder / checksums.FILE).mkdir()
  assert checksums.damage(folder) == f"{checksums.FILE} is damaged"
