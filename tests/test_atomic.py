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
