"""Embeddings and position indices, compared with their definitions."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mdt_jax.models.blocks import FinalLayer
from mdt_jax.models.embeddings import (
  FREQUENCIES,
  LabelEmbed,
  PatchEmbed,
  drop_labels,
  num_relative_positions,
  relative_position_index,
  sincos_positions,
  timestep_frequencies,
)
from mdt_jax.models.layers import layer_norm

# Positions.


@pytest.mark.parametrize("grid", [1, 2, 5, (2, 3), (7, 4), (1, 5)])
@pytest.mark.parametrize("width", [4, 12, 64])
def test_sincos_positions_match_their_definition(width, grid):
  rows, columns = grid if isinstance(grid, tuple) else (grid, grid)
  places = [(row, column) for row in range(rows) for column in range(columns)]
  expected = np.zeros((rows * columns, width))
  for token, (row, column) in enumerate(places):
    values = []
    for coordinate in (column, row):
      angles = [coordinate / 10000 ** (4 * i / width) for i in range(width // 4)]
      values += [math.sin(angle) for angle in angles]
      values += [math.cos(angle) for angle in angles]
    expected[token] = values
  np.testing.assert_allclose(sincos_positions(width, grid), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [1, 2, 3, 6])
def test_relative_position_index_matches_its_definition(grid):
  side = 2 * grid - 1
  expected = [
    [
      (query // grid - key // grid + grid - 1) * side
      + (query % grid - key % grid + grid - 1)
      for key in range(grid * grid)
    ]
    for query in range(grid * grid)
  ]
  np.testing.assert_array_equal(relative_position_index(grid), expected)


@pytest.mark.parametrize(("height", "width"), [(2, 3), (5, 2), (1, 4), (4, 1)])
def test_relative_positions_of_a_rectangle_count_all_offsets(height, width):
  """Rows of the table are the offsets (dy, dx), sorted: one row for each offset."""
  places = [(y, x) for y in range(height) for x in range(width)]
  offsets = [[(qy - ky, qx - kx) for ky, kx in places] for qy, qx in places]
  table = sorted({offset for row in offsets for offset in row})
  expected = [[table.index(offset) for offset in row] for row in offsets]
  np.testing.assert_array_equal(relative_position_index((height, width)), expected)
  assert num_relative_positions((height, width)) == len(table)


@pytest.mark.parametrize("grid", [1, 4])
def test_relative_position_index_skips_the_last_three_rows(grid):
  index = relative_position_index(grid)
  assert set(index.ravel()) == set(range((2 * grid - 1) ** 2))


# Timesteps.


@pytest.mark.parametrize("t", [0, 1, 37, 500, 999, 0.5, 333.25, 998.999])
def test_timestep_frequencies_match_their_definition(t):
  angles = [t * 10000 ** (-i / 128) for i in range(128)]
  expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
  # The relative error of float32 frequencies is 3e-8, so angles are off by 3e-5.
  actual = timestep_frequencies(jnp.array([t]))[0]
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_frequencies_have_the_bits_of_pytorch():
  """Those of AVX2. With AVX-512, PyTorch rounds five values to the other neighbour."""
  exponents = -math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128
  expected = torch.exp(exponents).numpy()
  steps = FREQUENCIES.view(np.int32) - expected.view(np.int32)
  is_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
  assert np.abs(steps).max() <= (0 if is_avx2 else 1)
  assert np.count_nonzero(steps) <= (0 if is_avx2 else 5)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_timestep_dtype_does_not_change_the_embedding(dtype):
  t = jnp.array([0, 7, 250], dtype)
  expected = timestep_frequencies(jnp.array([0.0, 7.0, 250.0]))
  np.testing.assert_array_equal(timestep_frequencies(t), expected)


# Labels.


@functools.cache
def dropped(rate):
  labels = jnp.arange(20_000) % 7
  return labels, drop_labels(jax.random.key(0), labels, 7, rate)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_labels_are_dropped_at_the_given_rate(rate):
  _, labels = dropped(rate)
  np.testing.assert_allclose((labels == 7).mean(), rate, atol=0.01)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_labels_that_are_not_dropped_are_unchanged(rate):
  labels, after = dropped(rate)
  assert ((after == labels) | (after == 7)).all()


def test_no_label_is_dropped_at_rate_zero():
  assert (dropped(0.0)[1] != 7).all()


@pytest.mark.parametrize(("dropout", "rows"), [(0.1, 8), (0.0, 7)])
def test_table_has_a_null_row_only_with_label_dropout(dropout, rows):
  embed = LabelEmbed(num_classes=7, hidden_size=4, dropout=dropout)
  params = embed.init(jax.random.key(0), jnp.array([0]))["params"]
  assert params["table"].shape == (rows, 4)


def test_labels_are_not_dropped_outside_training():
  embed = LabelEmbed(num_classes=7, hidden_size=4, dropout=0.999)
  table = jnp.arange(32.0).reshape(8, 4)
  labels = jnp.array([0, 6, 7])
  out = embed.apply({"params": {"table": table}}, labels)
  np.testing.assert_array_equal(out, table[labels])


# Patches.


@pytest.mark.parametrize(
  ("patch", "channels", "shape"), [(1, 4, (3, 3)), (2, 1, (4, 6)), (4, 3, (8, 4))]
)
def test_patch_embedding_equals_a_strided_convolution(patch, channels, shape):
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, *shape, channels)).astype(np.float32)
  kernel = rng.standard_normal((patch, patch, channels, 5)).astype(np.float32)
  linear = {"kernel": kernel.reshape(-1, 5), "bias": np.arange(5, dtype=np.float32)}
  tokens = PatchEmbed(patch, 5).apply({"params": {"linear": linear}}, images)
  expected = jax.lax.conv_general_dilated(
    images,
    kernel,
    (patch, patch),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  expected = expected.reshape(2, -1, 5) + linear["bias"]
  np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)


def test_bottleneck_is_a_product_of_two_kernels():
  """JiT's embedding: a convolution without bias, then one of 1 x 1 with a bias."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((2, 4, 8, 3)).astype(np.float32)
  first, second = (
    rng.standard_normal(shape).astype(np.float32) for shape in ((48, 2), (2, 5))
  )
  bias = np.arange(5, dtype=np.float32)
  params = {
    "bottleneck": {"kernel": first},
    "linear": {"kernel": second, "bias": bias},
  }
  tokens = PatchEmbed(4, 5, bottleneck=2).apply({"params": params}, images)
  one = {"linear": {"kernel": first @ second, "bias": bias}}
  expected = PatchEmbed(4, 5).apply({"params": one}, images)
  np.testing.assert_allclose(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize(("patch", "channels"), [(1, 4), (2, 3), (4, 1)])
def test_final_layer_places_each_patch_at_its_token(patch, channels, grid):
  rows, columns = grid
  width = patch * patch * channels
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((2, rows * columns, width)).astype(np.float32)
  params = {  # LayerNorm, then the identity.
    "modulation": {"linear": {"kernel": np.zeros((width, 2 * width)), "bias": 0.0}},
    "linear": {"kernel": np.eye(width), "bias": np.zeros(width)},
  }
  params["modulation"]["linear"]["bias"] = np.zeros(2 * width)
  images = FinalLayer(patch, channels, grid).apply(
    {"params": params}, tokens, np.zeros((2, width), np.float32)
  )
  normed = np.asarray(layer_norm(jnp.asarray(tokens)))
  assert images.shape == (2, rows * patch, columns * patch, channels)
  for token in range(rows * columns):
    row, column = (patch * place for place in divmod(token, columns))
    actual = images[:, row : row + patch, column : column + patch]
    expected = normed[:, token].reshape(2, patch, patch, channels)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
