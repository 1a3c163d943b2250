"""Conversion of arrays to uint8 pixels, grids, .npz files and latent previews."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mdt_jax.sampling import pictures


def test_to_uint8_truncates_like_the_released_code():
  values = np.array([-2, -1, -0.999, 0, 0.999, 1, 2], np.float32)
  assert pictures.to_uint8(values).tolist() == [0, 0, 0, 127, 254, 255, 255]


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


def test_to_uint8_on_device_matches_to_uint8():
  values = np.random.default_rng(0).uniform(-1.2, 1.2, 100_000).astype(np.float32)
  on_device = jax.jit(pictures.to_uint8_on_device)(values)
  np.testing.assert_array_equal(on_device, pictures.to_uint8(values))


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
