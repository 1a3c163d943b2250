"""Conversion of arrays to uint8 pixels, grids, .npz files and latent previews."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from mdt_jax import create_model
from mdt_jax.sampling import pictures

VALUES = np.random.default_rng(0).uniform(-1.2, 1.2, 100_000).astype(np.float32)
NETWORKS = {
  name: create_model(f"{name}-S/2", input_size=4) for name in ("DiT", "MDT", "MDTv2")
}


def test_to_uint8_truncates_like_mdt():
  """scripts/image_sample.py of sail-sg/MDT."""
  values = torch.tensor(VALUES)
  expected = ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
  for network in (None, NETWORKS["MDT"], NETWORKS["MDTv2"]):
    np.testing.assert_array_equal(pictures.to_uint8(VALUES, network), expected)


def test_to_uint8_rounds_like_dit():
  """sample_ddp.py of facebookresearch/DiT."""
  values = torch.tensor(VALUES)
  expected = torch.clamp(127.5 * values + 128.0, 0, 255).to(torch.uint8).numpy()
  actual = pictures.to_uint8(VALUES, NETWORKS["DiT"])
  sit = create_model("SiT-S/2")
  np.testing.assert_array_equal(pictures.to_uint8(VALUES, sit), actual)
  np.testing.assert_array_equal(actual, expected)
  assert 0.4 < (actual != pictures.to_uint8(VALUES)).mean() < 0.6


@pytest.mark.parametrize("name", NETWORKS)
def test_to_uint8_on_a_device_is_that_of_numpy(name):
  on_device = jax.jit(lambda x: pictures.to_uint8(x, NETWORKS[name]))(VALUES)
  np.testing.assert_array_equal(on_device, pictures.to_uint8(VALUES, NETWORKS[name]))


@pytest.mark.parametrize(
  ("count", "columns", "expected"), [(4, 0, (2, 2)), (5, 0, (3, 2)), (3, 3, (3, 1))]
)
def test_grid_is_square_or_has_the_given_columns(count, columns, expected):
  tiles = np.zeros((count, 64, 64, 3), np.uint8)
  grid = pictures.make_grid(tiles, [""] * count, columns)
  tile_w, tile_h = 64 + pictures.MARGIN, 64 + pictures.CAPTION_HEIGHT
  assert (grid.width // tile_w, grid.height // tile_h) == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_small_tiles_are_enlarged_without_blur(channels):
  tile = np.zeros((1, 8, 8, channels), np.uint8)
  tile[0, 0, 0] = 200
  pixels = np.asarray(pictures.make_grid(tile, ["7"]))
  top, left = pictures.CAPTION_HEIGHT, pictures.MARGIN
  assert (pixels[top : top + 8, left : left + 8] == 200).all()
  assert (pixels[top + 8 : top + 64, left + 8 : left + 64] == 0).all()


def test_grid_needs_one_caption_per_image():
  with pytest.raises(ValueError):
    pictures.make_grid(np.zeros((2, 8, 8, 1), np.uint8), ["one"])


def test_npz_is_read_in_batches(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  pictures.write_npz(tmp_path / "x.npz", [images[:3], images[3:]], np.arange(5))
  parts = list(pictures.read_npz(tmp_path / "x.npz", 2))
  assert [len(part) for part in parts] == [2, 2, 1]
  np.testing.assert_array_equal(np.concatenate(parts), images)


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_latent_preview_is_uint8_with_one_or_three_channels(channels):
  latents = np.random.default_rng(0).normal(3, 2, (4, 8, 8, channels))
  preview = pictures.latent_preview(latents)
  assert preview.dtype == np.uint8
  assert preview.shape == (4, 8, 8, 3 if channels >= 3 else 1)
  assert 100 < preview.mean() < 155
