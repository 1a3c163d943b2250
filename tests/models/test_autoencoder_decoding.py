"""Decoding in slices and in tiles, compared with decoding the whole batch at once."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from mdt_jax import SettingError
from mdt_jax.models.autoencoder_decoding import (
  _tiles,
  decode_in_slices,
  decode_in_tiles,
)
from mdt_jax.models.autoencoder_kl import decode
from tests import reference
from tests.models.test_autoencoder_kl import ROUNDING, recorded, rms_error, vae

# Slices.


@functools.cache
def five_latents():
  shape = (5, *recorded("vae_no_quant", "z").shape[1:])
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("slice_size", [1, 2, 5, 8])
def test_decoding_in_slices_is_close_to_one_batch(slice_size):
  model, params = vae("vae_no_quant")
  sliced = decode_in_slices(model, params, five_latents(), slice_size)
  whole = np.asarray(decode(model, params, five_latents()))
  assert reference.relative_error(sliced, whole) < ROUNDING


@pytest.mark.parametrize("slice_size", [1, 2])
def test_each_slice_equals_decode_bit_for_bit(slice_size):
  """The batch sizes must agree: XLA compiles another convolution for another size."""
  model, params = vae("vae_no_quant")
  z = five_latents()
  parts = [z[i : i + slice_size] for i in range(0, len(z), slice_size)]
  expected = np.concatenate([decode(model, params, part) for part in parts])
  sliced = decode_in_slices(model, params, z, slice_size)
  np.testing.assert_array_equal(sliced, expected)


def test_slice_size_zero_is_refused():
  with pytest.raises(SettingError, match="slice_size = 0: "):
    decode_in_slices(*vae("vae_no_quant"), five_latents(), slice_size=0)


# Tiles.


@functools.cache
def large_latents():
  shape = (1, 24, 20, 16)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.cache
def large_whole():
  return np.asarray(decode(*vae("vae_no_quant"), large_latents()))


@functools.cache
def in_tiles(tile_size, overlap):
  model, params = vae("vae_no_quant")
  return np.asarray(decode_in_tiles(model, params, large_latents(), tile_size, overlap))


def test_single_tile_equals_decode():
  np.testing.assert_array_equal(in_tiles(24, 8), large_whole())


def test_decoding_in_tiles_is_close_to_decode():
  """They are not equal: GroupNorm sees one tile, and the tile's edges are padded."""
  assert in_tiles(16, 8).shape == large_whole().shape
  assert rms_error(in_tiles(16, 8), large_whole()) < 0.1


def test_larger_overlap_reduces_the_difference():
  errors = [rms_error(in_tiles(16, overlap), large_whole()) for overlap in (0, 4, 8)]
  assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_pixels_outside_the_overlap_equal_their_tile():
  model, params = vae("vae_no_quant")
  corner = np.asarray(decode(model, params, large_latents()[:, :16, :16]))
  # The second tiles start at latents 8 and 4.
  error = reference.relative_error(in_tiles(16, 8)[:, :16, :8], corner[:, :16, :8])
  assert error < ROUNDING


@pytest.mark.parametrize(
  ("length", "tile_size", "overlap", "starts"),
  [
    (24, 24, 8, [0]),
    (20, 24, 8, [0]),
    (24, 16, 8, [0, 8]),
    (24, 16, 0, [0, 8]),
    (25, 16, 8, [0, 4, 9]),
    (64, 16, 4, [0, 12, 24, 36, 48]),
    (9, 8, 7, [0, 1]),
  ],
)
def test_tiles_cover_the_axis_with_weights_that_sum_to_one(
  length, tile_size, overlap, starts
):
  actual, weights = _tiles(length, tile_size, overlap, factor=2)
  assert actual.tolist() == starts
  assert weights.shape == (len(starts), 2 * min(length, tile_size))
  sums = np.zeros(2 * length)
  for start, row in zip(actual.tolist(), weights, strict=True):
    sums[2 * start : 2 * start + len(row)] += row
  np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_tile_weights_fade_linearly_over_the_overlap():
  _, weights = _tiles(24, 16, 8, factor=1)
  fade = (np.arange(8) + 0.5) / 8
  np.testing.assert_allclose(weights[0], [1] * 8 + list(1 - fade), rtol=1e-6)
  np.testing.assert_allclose(weights[1], [*fade, *[1] * 8], rtol=1e-6)


@pytest.mark.parametrize("overlap", [-1, 16, 17])
def test_invalid_overlap_is_refused(overlap):
  with pytest.raises(SettingError, match=f"overlap = {overlap}: "):
    in_tiles(16, overlap)


def test_side_as_long_as_the_overlap_is_one_tile():
  starts, weights = _tiles(16, 64, 16, 8)
  assert starts.tolist() == [0]
  np.testing.assert_array_equal(weights, np.ones((1, 8 * 16)))
