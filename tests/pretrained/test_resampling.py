"""Resampled positions, bias tables, patch embeddings and final layers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mdt_jax.models.embeddings import relative_position_index, sincos_positions
from mdt_jax.pretrained.resampling import (
  bicubic_weights,
  resize_bias_table,
  resize_patch_embedding,
  resize_patches,
  resize_positions,
)


@pytest.mark.parametrize(("size", "new_size"), [(16, 32), (32, 16), (5, 7), (3, 3)])
def test_weights_equal_those_of_jax_image_resize(size, new_size):
  expected = jax.image.resize(
    np.eye(size, dtype=np.float32), (new_size, size), "cubic", antialias=False
  )
  np.testing.assert_allclose(bicubic_weights(size, new_size), expected, atol=1e-6)


def ramp(grid):
  """A constant and two linear functions of the token's centre, in [0, 1]."""
  height, width = grid
  y, x = np.meshgrid(
    (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij"
  )
  return np.stack([np.ones_like(y), y, x], -1)


@pytest.mark.parametrize("new_grid", [(32, 32), (8, 8), (24, 10)])
def test_constant_and_linear_positions_stay_exact_inside(new_grid):
  grid = (16, 16)
  found = resize_positions(ramp(grid).reshape(-1, 3), grid, new_grid)
  found, expected = found.reshape(*new_grid, 3), ramp(new_grid)
  np.testing.assert_allclose(found[..., 0], 1, rtol=1e-6)
  inside = slice(4, -4) if new_grid[0] > 16 else slice(2, -2)
  np.testing.assert_allclose(
    found[inside, inside], expected[inside, inside], rtol=1e-6, atol=1e-7
  )


def test_positions_return_from_twice_the_grid():
  """Slow waves return; the fastest (6.3 tokens) lose 0.7%, and 2.1% at the edge."""
  positions = sincos_positions(64, 16)
  there = resize_positions(positions, 16, 32)
  back = resize_positions(there, 32, 16)
  errors = np.abs(back - positions).reshape(16, 16, 4, 16)
  assert errors.max() < 0.022
  inside = errors[2:-2, 2:-2].max((0, 1, 2))  # by frequency, the highest first
  assert inside.max() < 0.008
  assert inside[2:].max() < 1e-4


def test_equal_grids_change_nothing():
  rng = np.random.default_rng(0)
  positions = rng.standard_normal((12, 8)).astype(np.float32)
  np.testing.assert_array_equal(resize_positions(positions, (3, 4), (3, 4)), positions)
  table = rng.standard_normal((5 * 7 + 3, 2)).astype(np.float32)
  np.testing.assert_array_equal(resize_bias_table(table, (3, 4), (3, 4)), table)


def biases(grid, function):
  """The bias table of a function of the distance (dy, dx) as a share of the image."""
  height, width = grid
  dy = np.arange(1 - height, height) / height
  dx = np.arange(1 - width, width) / width
  table = function(*np.meshgrid(dy, dx, indexing="ij")).reshape(-1, 1)
  return np.concatenate([table, [[7.0], [8.0], [9.0]]])


@pytest.mark.parametrize("new_grid", [(32, 32), (8, 8), (12, 20)])
def test_linear_biases_stay_exact_for_distances_of_the_old_grid(new_grid):
  function = lambda dy, dx: 1 + 2 * dy - 3 * dx  # noqa: E731
  found = resize_bias_table(biases((16, 16), function), (16, 16), new_grid)
  expected = biases(new_grid, function)
  assert found.shape == expected.shape
  np.testing.assert_array_equal(found[-3:], expected[-3:])  # the rows that none reads
  height, width = new_grid
  shape = (2 * height - 1, 2 * width - 1)
  inside = np.ix_(*(np.abs(np.arange(1 - n, n)) < 0.7 * n for n in new_grid))
  np.testing.assert_allclose(
    found[:-3, 0].reshape(shape)[inside],
    expected[:-3, 0].reshape(shape)[inside],
    rtol=1e-5,
    atol=1e-6,
  )


def test_bias_of_a_token_with_itself_stays():
  rng = np.random.default_rng(0)
  table = rng.standard_normal((31 * 31 + 3, 4)).astype(np.float32)
  found = resize_bias_table(table, 16, 32)
  own, new_own = (relative_position_index(grid)[0, 0] for grid in (16, 32))
  np.testing.assert_allclose(found[new_own], table[own], rtol=1e-6)


@pytest.mark.parametrize("new_patch", [4, 8])
def test_enlarged_patches_have_the_embedding_of_the_patches(new_patch):
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((2, 2, 3, 5))
  patches = rng.standard_normal((2, 2, 3))
  found = np.einsum(
    "pqc,pqcd->d",
    resize_patches(patches, new_patch),
    resize_patch_embedding(kernel, new_patch),
  )
  np.testing.assert_allclose(found, np.einsum("pqc,pqcd->d", patches, kernel), 1e-5)


def test_patch_embedding_returns_from_twice_the_patch():
  kernel = np.random.default_rng(0).standard_normal((4, 4, 3, 5)).astype(np.float32)
  there = resize_patch_embedding(kernel, 8)
  patches = np.random.default_rng(1).standard_normal((4, 4, 3))
  enlarged = resize_patches(patches, 8)
  np.testing.assert_allclose(
    np.einsum("pqc,pqcd->d", enlarged, there),
    np.einsum("pqc,pqcd->d", patches, kernel),
    rtol=1e-4,
    atol=1e-5,
  )
