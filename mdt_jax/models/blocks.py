"""Transformer blocks with adaLN-Zero conditioning and a relative position bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.attention import attention
from mdt_jax.models.embeddings import linear_init, normal_init
from mdt_jax.models.partitioning import linear, spread_batch

Array = jax.Array
Dtype = Any

# Rows of the bias table that no index reads. They come from BEiT's class token and
# are kept because the released checkpoints hold them.
UNUSED_BIAS_ROWS = 3


def relative_position_index(grid_size: int) -> np.ndarray:
  """Row of the bias table for each pair of tokens.

  Returns:
    (L, L) int32 with L = grid_size**2: (dy + W - 1)(2W - 1) + dx + W - 1, where
    dy and dx lead from the key's place to the query's and W is the grid size.
  """
  rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
  dy = rows[:, None] - rows[None, :] + grid_size - 1
  dx = columns[:, None] - columns[None, :] + grid_size - 1
  return (dy * (2 * grid_size - 1) + dx).astype(np.int32)


def layer_norm(x: Array) -> Array:
  """LayerNorm without affine parameters, eps 1e-6, computed in float32."""
  norm = nn.LayerNorm(
    epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False
  )
  return norm.apply({}, x.astype(jnp.float32)).astype(x.dtype)


# The backward pass computes the next two again: to keep what it needs of them takes as
# much memory as all the rest, and more time.


@jax.checkpoint
def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
  """LayerNorm of x (B, L, D), scaled and shifted by vectors (B, D)."""
  return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@jax.checkpoint
def gelu(x: Array) -> Array:
  """GELU, in its approximation by tanh."""
  return nn.gelu(x, approximate=True)


class Modulation(nn.Module):
  """Conditioning (B, D) to `count` vectors (B, D) each; zero at the start."""

  count: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, c: Array) -> list[Array]:
    out = linear(
      self.count * c.shape[-1],
      "linear",
      "modulation/",
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )(nn.silu(c))
    return jnp.split(out, self.count, axis=-1)


class Attention(nn.Module):
  """Multi-head self-attention, with a bias by relative position where asked.

  Attributes:
    num_heads: heads.
    bias_rows: rows of the relative position bias table; 0 for none (DiT).
    dtype: of the products; the softmax is in float32.
  """

  num_heads: int
  bias_rows: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, position_index: Array | None) -> Array:
    """x (B, K, D) -> (B, K, D); position_index (1 or B, K, K) into the table."""
    dim = x.shape[-1]
    dense = dict(kernel_init=linear_init, dtype=self.dtype)
    # Heads are an axis of their own, so that devices can share them.
    heads = (3, self.num_heads, dim // self.num_heads)
    qkv = linear(heads, "qkv", **dense)(x)
    query, key, value = jnp.unstack(qkv, axis=2)
    bias = None
    if self.bias_rows:
      table = self.param(
        "relative_position_bias",
        normal_init,  # timm truncates at 2, a hundred deviations away
        (self.bias_rows, self.num_heads),
        jnp.float32,
      )
      bias = jnp.asarray(table)[position_index]
      bias = bias.transpose(0, 3, 1, 2)  # (1 or B, heads, K, K)
    out = attention(query, key, value, bias)
    return linear(dim, "proj", axis=(-2, -1), **dense)(out)


class Block(nn.Module):
  """One block: (long skip,) attention, MLP, both modulated by the conditioning.

  It returns its output twice, as `nn.scan` wants a carry and an output; the second
  is None unless `emit` is set.
  """

  num_heads: int
  mlp_ratio: float
  bias_rows: int
  long_skip: bool = False
  emit: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, c: Array, position_index: Array | None, skip: Array | None = None
  ) -> tuple[Array, Array | None]:
    """x (B, K, D), c (B, D), skip (B, K, D) where `long_skip` is set."""
    dim = x.shape[-1]
    dense = dict(kernel_init=linear_init, dtype=self.dtype)
    x = spread_batch(x)
    if self.long_skip:
      joined = jnp.concatenate([x, skip], axis=-1)
      x = linear(dim, "skip", **dense)(joined)

    shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(
      6, self.dtype, name="modulation"
    )(c)
    attend = Attention(self.num_heads, self.bias_rows, self.dtype, name="attention")
    h = attend(modulated_norm(x, shift1, scale1), position_index)
    x = x + gate1[:, None] * h

    h = modulated_norm(x, shift2, scale2)
    h = linear(int(dim * self.mlp_ratio), "fc1", **dense)(h)
    h = linear(dim, "fc2", **dense)(gelu(h))
    x = x + gate2[:, None] * h
    return x, (x if self.emit else None)


class FinalLayer(nn.Module):
  """Tokens (B, L, D) to images (B, H, W, out_channels); zero at the start."""

  patch_size: int
  out_channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, c: Array) -> Array:
    batch, length, _ = x.shape
    p, grid = self.patch_size, int(length**0.5)
    shift, scale = Modulation(2, self.dtype, name="modulation")(c)
    x = linear(
      p * p * self.out_channels,
      "linear",
      "final_layer/",
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )(modulated_norm(x, shift, scale))
    x = x.reshape(batch, grid, grid, p, p, self.out_channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid * p, grid * p, self.out_channels)
