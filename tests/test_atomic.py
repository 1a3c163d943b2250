"""Atomic writes: a file is replaced as a whole or not at all."""

import json
import os

import pytest

from mdt_jax.atomic import atomic_write, write_json


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
