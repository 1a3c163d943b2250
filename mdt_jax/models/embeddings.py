"""Embeddings of patches, timesteps, class labels and token positions."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from mdt_jax.models.layers import gelu, linear, normal_init, scaled_norm
from mdt_jax.models.partitioning import gather, parameter_axes
from mdt_jax.sizes import Size, height_width
from mdt_jax.types import Array, Dtype

NUM_FREQUENCIES = 256  # of the timestep embedding
MAX_PERIOD = 10_000


def sincos_positions(hidden_size: int, grid_size: Size) -> Float[np.ndarray, "L D"]:
  """Computes the 2-D sin-cos position embedding of MAE (arXiv 2111.06377).

  Args:
    hidden_size: D, divisible by 4.
    grid_size: tokens along each side, or (tokens of a column, tokens of a row).

  Returns:
    (L, D) float32 for the L tokens of the grid in row-major order. The first half of
    a row embeds the column, the second half the row: D/4 sines, then D/4 cosines each.
  """
  quarter = hidden_size // 4
  frequencies = MAX_PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)
  rows, columns = _rows_and_columns(grid_size)
  angles = [np.outer(coordinate, frequencies) for coordinate in (columns, rows)]
  waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


def num_relative_positions(grid_size: Size) -> int:
  """Returns the number of possible (dy, dx) of two tokens: (2H - 1)(2W - 1)."""
  height, width = height_width(grid_size)
  return (2 * height - 1) * (2 * width - 1)


def relative_position_index(grid_size: Size) -> Int[np.ndarray, "L L"]:
  """Returns the row of the bias table for each (query, key) pair of tokens.

  The row is (dy + H - 1)(2W - 1) + dx + W - 1. H and W are the height and the width of
  the grid; dy and dx are the query's row and column minus the key's.

  Args:
    grid_size: H = W, tokens along each side, or (H, W).

  Returns:
    (L, L) int32 with L = H W tokens in row-major order.
  """
  height, width = height_width(grid_size)
  rows, columns = _rows_and_columns(grid_size)
  dy = rows[:, None] - rows[None, :] + height - 1
  dx = columns[:, None] - columns[None, :] + width - 1
  return (dy * (2 * width - 1) + dx).astype(np.int32)


def _rows_and_columns(
  grid_size: Size,
) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]:
  """Returns row and column of each token of a grid, in row-major order."""
  height, width = height_width(grid_size)
  rows, columns = np.divmod(np.arange(height * width), width)
  return rows, columns


def _frequencies() -> Float[np.ndarray, "128"]:
  """Computes the frequencies w_i of `timestep_frequencies`, as PyTorch does on CPUs."""
  half = NUM_FREQUENCIES // 2
  exponents = -math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
  # t multiplies an error in the last bit: 3e-5 rad at t = 999. The float32 exp of NumPy
  # and of XLA have such errors; a float64 exp, rounded once, has none.
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  # PyTorch's float32 exp rounds two values up that lie just below the middle.
  rounded_up = [12, 106]
  frequencies[rounded_up] = np.nextafter(frequencies[rounded_up], np.float32(1))
  return frequencies


FREQUENCIES = _frequencies()


def timestep_frequencies(t: Shaped[Array, "B"]) -> Float[Array, "B 256"]:
  """Computes sinusoids of timesteps: 128 of cos(t w_i), then 128 of sin(t w_i).

  w_i = MAX_PERIOD^(-i / 128) for i = 0 … 127.

  Args:
    t: (B,) timesteps, integer or float.

  Returns:
    (B, 256) float32.
  """
  angles = t.astype(jnp.float32)[:, None] * FREQUENCIES
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def drop_labels(
  key: Array, labels: Int[Array, "*B"], num_classes: int, rate: float
) -> Int[Array, "*B"]:
  """Replaces each label by the null label, `num_classes`, with probability `rate`."""
  dropped = jax.random.bernoulli(key, rate, labels.shape)
  return jnp.where(dropped, num_classes, labels)


def drop_captions(
  key: Array, captions: Float[Array, "*B S V"], rate: float
) -> Float[Array, "*B S V"]:
  """Replaces each caption by zeros, the null caption, with probability `rate`."""
  dropped = jax.random.bernoulli(key, rate, captions.shape[:-2])
  return jnp.where(dropped[..., None, None], 0, captions)


class PatchEmbed(nn.Module):
  """Maps images to L = (H / p)(W / p) tokens by a linear layer on p x p patches.

  Attributes:
    patch_size: p.
    hidden_size: D.
    bottleneck: R, width of a linear layer without bias before that layer, so that the
      map from a patch has rank R: the embedding of JiT (arXiv 2511.13720). 0: none.
    dtype: dtype of the products.
    forward_mode: see `layers.linear`.
  """

  patch_size: int
  hidden_size: int
  bottleneck: int = 0
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B L D"]:
    patches = patchify(images, self.patch_size)
    options: dict[str, Any] = dict(
      path="patch_embed/", dtype=self.dtype, forward_mode=self.forward_mode
    )
    if self.bottleneck:
      reduce = linear(self.bottleneck, "bottleneck", use_bias=False, **options)
      patches = reduce(patches)  # (B, L, R)
    return linear(self.hidden_size, "linear", **options)(patches)  # (B, L, D)


def patchify(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B L P"]:
  """Cuts images into patches of p x p pixels; inverts `unpatchify`.

  Args:
    images: (B, H, W, C).
    patch_size: p, which divides H and W.

  Returns:
    (B, L, P): L = (H / p)(W / p) patches in row-major order, each of P = p p C numbers.
  """
  b, h, w, c = images.shape
  p = patch_size
  patches = images.reshape(b, h // p, p, w // p, p, c)
  return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)


def unpatchify(
  patches: Float[Array, "B L P"], grid_size: Size, patch_size: int
) -> Float[Array, "B H W C"]:
  """Joins patches of p x p pixels to images: P = p p C numbers, the channels last.

  Args:
    patches: (B, L, P), one patch for each token.
    grid_size: tokens along each side, or (tokens of a column, tokens of a row).
    patch_size: p.
  """
  (rows, columns), p = height_width(grid_size), patch_size
  images = patches.reshape(len(patches), rows, columns, p, p, -1)
  images = images.transpose(0, 1, 3, 2, 4, 5)  # (B, H / p, p, W / p, p, C)
  return images.reshape(len(patches), rows * p, columns * p, -1)


class TimestepEmbed(nn.Module):
  """Embeds timesteps: `timestep_frequencies`, then linear, SiLU, linear."""

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
  """Embeds integer class labels by looking up rows of a table.

  The table has num_classes rows. The null label is `num_classes`; `null` says how it is
  embedded. With train=True, labels are dropped; this needs the random stream
  "label_dropout".

  Out-of-range labels do not raise an error. JAX's gather clamps them: a label past the
  last row reads the last row. A negative label counts from the end of the table, as in
  NumPy, and reads row 0 if it is too small. So if there is a null label, both -1 and
  any label above num_classes read it.

  Attributes:
    num_classes: number of classes, without the null label.
    hidden_size: D.
    dropout: probability of dropping a label in training.
    dtype: dtype of the embedding.
    null: "learned": the table has one more row, for the null label, if `dropout` is
      above 0 (DiT). "zero": the null label is the zero vector, for any `dropout`
      (MaskDiT).
  """

  num_classes: int
  hidden_size: int
  dropout: float
  dtype: Dtype = jnp.float32
  null: str = "learned"

  @nn.compact
  def __call__(
    self, labels: Int[Array, "B"], train: bool = False
  ) -> Float[Array, "B D"]:
    rows = self.num_classes + (self.dropout > 0 and self.null == "learned")
    table = self.param("table", normal_init, (rows, self.hidden_size), jnp.float32)
    if train and self.dropout > 0:
      key = self.make_rng("label_dropout")
      labels = drop_labels(key, labels, self.num_classes, self.dropout)
    table = gather(jnp.asarray(table, self.dtype), parameter_axes("label_embed/table"))
    if self.null == "zero":
      table = jnp.concatenate([table, jnp.zeros_like(table[:1])])
    return table[labels]


class CaptionMlp(nn.Module):
  """Maps embeddings of captions: linear, GELU, LayerNorm with weights, linear.

  Attributes:
    hidden_size: D, the width of the output.
    dtype, forward_mode: see `layers.linear`.
  """

  hidden_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, y: Float[Array, "*B V"]) -> Float[Array, "*B D"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    h = gelu(linear(self.hidden_size, "fc1", **options)(y))
    h = scaled_norm("norm", self.dtype)(h)
    return linear(self.hidden_size, "fc2", **options)(h)


class PooledCaption(nn.Module):
  """Embeds captions for networks without cross-attention: the mean of `CaptionMlp`.

  With train=True, captions are dropped; this needs the random stream "label_dropout".

  Attributes:
    hidden_size: D.
    dropout: probability of replacing a caption by zeros in training.
    dtype: dtype of the products.
  """

  hidden_size: int
  dropout: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, y: Float[Array, "B S V"], train: bool = False
  ) -> Float[Array, "B D"]:
    if train and self.dropout > 0:
      y = drop_captions(self.make_rng("label_dropout"), y, self.dropout)
    mlp = CaptionMlp(self.hidden_size, self.dtype, name="mlp")
    return mlp(y.astype(self.dtype)).mean(axis=1)
