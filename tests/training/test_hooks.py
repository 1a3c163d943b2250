"""Hooks: pictures and scores that a run writes at regular intervals."""

from __future__ import annotations

import pytest
from PIL import Image

from mdt_jax.experiment import build
from mdt_jax.training.sample_pictures import Pictures
from tests.training.tiny import tiny_dit_config


def test_picture_that_fails_half_way_leaves_no_file(tmp_path, monkeypatch):
  pictures = Pictures(build(tiny_dit_config()), tmp_path)
  image = Image.new("RGB", (8, 8))
  save, made = image.save, {"samples": image}

  def fail(path, **options):
    save(path, **options)
    raise OSError("the disk is full")

  monkeypatch.setattr(image, "save", fail)
  with pytest.raises(OSError, match="full"):
    pictures._write(tmp_path / "step_1.png", made)
  assert not list(tmp_path.iterdir())
  monkeypatch.setattr(image, "save", save)
  pictures._write(tmp_path / "step_1.png", made)
  assert [path.name for path in tmp_path.iterdir()] == ["step_1.png"]
  with Image.open(tmp_path / "step_1.png") as picture:
    assert picture.size == (8, 8)
