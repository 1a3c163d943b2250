"""Networks whose input is higher than wide, or wider than high."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.models.embeddings import num_relative_positions, relative_position_index
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.registry import init_params
from tests import reference

WIDTH, HEADS, PATCH = 16, 2, 2
HEIGHT, LENGTH = 6, 10  # of the input: 3 x 5 tokens
NAMES = ("DiT-S/2", "MDT-S/2", "MDTv2-S/2")
SIZES = dict(hidden_size=WIDTH, num_heads=HEADS, depth=4, num_classes=3, in_channels=2)
TOLERANCE = reference.FORWARD_TOLERANCE


def make(name, size):
  return create_model(name, **SIZES, decode_depth=2, input_size=size)


@functools.cache
def inputs():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, HEIGHT, LENGTH, 2)).astype(np.float32)
  return x, np.array([10.0, 700.0], np.float32), np.array([0, 3])


def transposed_tokens(height, width):
  """Index of each token of the transposed grid in the grid of height x width tokens."""
  return np.arange(height * width).reshape(height, width).T.reshape(-1)


def transpose(params, height, width):
  """Parameters of the network on the transposed input (grid height x width tokens)."""
  order = transposed_tokens(height, width)
  index = relative_position_index((height, width))
  bias_rows = np.zeros(num_relative_positions((height, width)), int)
  bias_rows[relative_position_index((width, height))] = index[order][:, order]

  def change(path, value):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("pos_embed"):
      return value[order]
    if name.endswith("relative_position_bias"):
      rows = np.concatenate([bias_rows, len(bias_rows) + np.arange(3)])
      return value[..., rows, :]
    if name == "patch_embed/linear/kernel":
      pixels = value.reshape(PATCH, PATCH, -1, WIDTH).swapaxes(0, 1)
      return pixels.reshape(value.shape)
    if name.startswith("final_layer/linear"):
      pixels = value.reshape(*value.shape[:-1], PATCH, PATCH, -1).swapaxes(-3, -2)
      return pixels.reshape(value.shape)
    return value

  return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.parametrize("num_keep", [None, 6])
@pytest.mark.parametrize("name", NAMES)
def test_transposed_network_transposes_its_output(name, num_keep):
  """Rows and columns swap roles in every place: a network that mixed them up fails."""
  x, t, y = inputs()
  wide, high = make(name, (HEIGHT, LENGTH)), make(name, (LENGTH, HEIGHT))
  rows, columns = HEIGHT // PATCH, LENGTH // PATCH
  params = reference.random_params(wide)
  noise = np.random.default_rng(1).random((2, rows * columns)).astype(np.float32)
  masks = [None, None]
  if num_keep is not None and wide.takes_mask:
    order = transposed_tokens(rows, columns)
    masks = [token_mask_from_noise(n, num_keep) for n in (noise, noise[:, order])]
  expected = wide.apply({"params": params}, x, t, y, masks[0])
  swapped = {"params": transpose(params, rows, columns)}
  actual = high.apply(swapped, x.swapaxes(1, 2), t, y, masks[1])
  error = reference.relative_error(actual.swapaxes(1, 2), np.asarray(expected))
  assert error < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_bias_and_positions_have_the_shapes_of_the_grid(name):
  model = make(name, (HEIGHT, LENGTH))
  assert (model.num_tokens, model.grid_size) == (15, (3, 5))
  shapes = jax.tree.map(np.shape, init_params(model, jax.random.key(0)))
  assert shapes["pos_embed"] == (15, WIDTH)
  if model.takes_mask:
    table = shapes["side_block"]["attention"]["relative_position_bias"]
    assert table == ((2 * 3 - 1) * (2 * 5 - 1) + 3, HEADS)


@pytest.mark.parametrize("name", NAMES)
def test_square_of_two_numbers_is_the_square_of_one(name):
  assert make(name, (8, 8)) == make(name, 8) == make(name, [8, 8])
  assert make(name, (8, 8)).grid_size == 4


def test_hidden_tokens_of_a_rectangle_do_not_reach_the_encoder():
  model = make("MDT-S/2", (HEIGHT, LENGTH))
  params = {"params": reference.random_params(model)}
  x, t, y = inputs()
  mask = token_mask_from_noise(jnp.tile(jnp.arange(15.0), (2, 1)), 8)
  forward = jax.jit(lambda x: model.apply(params, x, t, y, mask))
  before = forward(x)
  # Tokens 8 to 14 are removed: token 8 is row 1, column 3.
  hidden, visible = x.copy(), x.copy()
  hidden[:, 2:4, 6:8] += 5
  visible[:, 2:4, 4:6] += 5
  np.testing.assert_array_equal(forward(hidden), before)
  assert float(jnp.abs(forward(visible) - before).max()) > 0


@pytest.mark.parametrize("shape", [(2, LENGTH, HEIGHT, 2), (2, 4, 15, 2)])
def test_input_of_another_shape_is_refused(shape):
  model = make("MDTv2-S/2", (HEIGHT, LENGTH))
  params = {"params": reference.random_params(model)}
  _, t, y = inputs()
  with pytest.raises(ValueError, match=r"\('B', 6, 10, 2\), has \(2, "):
    model.apply(params, np.zeros(shape, np.float32), t, y)
