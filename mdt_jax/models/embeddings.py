"""Embeddings of patches, timesteps, labels and positions."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from mdt_jax.models.layers import linear, normal_init
from mdt_jax.models.partitioning import gather, parameter_axes
from mdt_jax.types import Array, Dtype

NUM_FREQUENCIES = 256  # of the timestep embedding
MAX_PERIOD = 10_000


def sincos_positions(hidden_size: int, grid_size: int) -> Float[np.ndarray, "L D"]:
  """2-D sin-cos position embedding, the column first (MAE, arXiv 2111.06377).

  Args:
    hidden_size: D, divisible by 4.
    grid_size: tokens along each side.

  Returns:
    (L, D) float32, the L = grid_size**2 tokens in row-major order: for each coordinate
    D/4 sines, then D/4 cosines.
  """
  quarter = hidden_size // 4
  frequencies = MAX_PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)
  rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
  angles = [np.outer(coordinate, frequencies) for coordinate in (columns, rows)]
  waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


def relative_position_index(grid_size: int) -> Int[np.ndarray, "L L"]:
  """Row of the bias table for each pair (query, key) of the L = grid_size**2 tokens.

  (dy + W - 1)(2W - 1) + dx + W - 1, where dy and dx are the query's row and column
  minus the key's, and W is the grid size.
  """
  rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
  dy = rows[:, None] - rows[None, :] + grid_size - 1
  dx = columns[:, None] - columns[None, :] + grid_size - 1
  return (dy * (2 * grid_size - 1) + dx).astype(np.int32)


def timestep_frequencies(t: Shaped[Array, "B"]) -> Float[Array, "B 256"]:
  """Sinusoids of timesteps, integer or not, cosines first: cos(t w_i), sin(t w_i).

  w_i = MAX_PERIOD^(-i / 128), i = 0 … 127.
  """
  half = NUM_FREQUENCIES // 2
  exponents = -math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
  # Rounded once, from float64: t multiplies an error in the last bit. PyTorch's exp is
  # exact to that rounding in all but two of 128 entries; XLA's and NumPy's are not.
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def drop_labels(
  key: Array, labels: Int[Array, "*B"], num_classes: int, rate: float
) -> Int[Array, "*B"]:
  """Replaces each label by the null label `num_classes` with probability `rate`."""
  dropped = jax.random.bernoulli(key, rate, labels.shape)
  return jnp.where(dropped, num_classes, labels)


class PatchEmbed(nn.Module):
  """Images to tokens, L = (H / p) (W / p): one linear map of each patch."""

  patch_size: int
  hidden_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False  # see `layers.linear`

  @nn.compact
  def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
    b, h, w, c = images.shape
    p = self.patch_size
    patches = images.reshape(b, h // p, p, w // p, p, c)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
    embed = linear(
      self.hidden_size,
      "linear",
      path="patch_embed/",
      dtype=self.dtype,
      forward_mode=self.forward_mode,
    )
    return embed(patches)  # (B, L, D)


class TimestepEmbed(nn.Module):
  """Timesteps (B,) to vectors (B, D): sinusoids, then linear, SiLU, linear."""

  hidden_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False  # see `layers.linear`

  @nn.compact
  def __call__(self, t: Shaped[Array, "B"]) -> Float[Array, "B D"]:
    fc1, fc2 = (
      linear(
        self.hidden_size,
        name,
        path="timestep_embed/",
        kernel_init=normal_init,
        dtype=self.dtype,
        forward_mode=self.forward_mode,
      )
      for name in ("fc1", "fc2")
    )
    x = timestep_frequencies(t).astype(self.dtype)  # (B, 256)
    return fc2(nn.silu(fc1(x)))


class LabelEmbed(nn.Module):
  """Labels (B,) to vectors (B, D): the rows of a table.

  The last row, number `num_classes`, is the null label's. It exists where `dropout` is
  above 0, as in the released code. In training, labels are dropped with the random
  stream "label_dropout".
  """

  num_classes: int
  hidden_size: int
  dropout: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, labels: Int[Array, "B"], train: bool = False
  ) -> Float[Array, "B D"]:
    rows = self.num_classes + (self.dropout > 0)
    table = self.param("table", normal_init, (rows, self.hidden_size), jnp.float32)
    if train and self.dropout > 0:
      key = self.make_rng("label_dropout")
      labels = drop_labels(key, labels, self.num_classes, self.dropout)
    table = gather(jnp.asarray(table, self.dtype), parameter_axes("label_embed/table"))
    return table[labels]
