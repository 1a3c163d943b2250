"""The layers of MDT and DiT: adaLN-Zero, attention, transformer block, last layer.

Letters in shapes: B samples; H, W, C height, width and channels of the latents; L
tokens of an image; K tokens that a block sees; D width of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from mdt_jax.models.attention import (
  KERNELS,
  attention_weights,
  kernel_for,
  plain_attention,
)
from mdt_jax.models.condition_layers import CrossAttention, Embedded, pooled_of
from mdt_jax.models.embeddings import unpatchify
from mdt_jax.models.layers import (
  ATTENTION,
  gelu,
  linear,
  modulated_norm,
  normal_init,
)
from mdt_jax.models.masking import TokenMask, restore_tokens
from mdt_jax.models.partitioning import look_up, shard_batch
from mdt_jax.sizes import Size
from mdt_jax.types import Array, Dtype


class Modulation(nn.Module):
  """Maps the conditioning c to `count` vectors (shift, scale or gate): adaLN-Zero.

  Attributes:
    count: number of vectors.
    width: length of each vector, the width of the tokens.
    activation: function of c before the linear map.
    dtype, forward_mode: see `MDT`.
  """

  count: int
  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False
  activation: Callable[[Array], Array] = nn.silu

  @nn.compact
  def __call__(self, c: Float[Array, "B E"] | Embedded) -> list[Array]:
    out = linear(
      self.count * self.width,
      "linear",
      path="modulation/",
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      forward_mode=self.forward_mode,
    )(self.activation(pooled_of(c)))
    return jnp.split(out, self.count, axis=-1)  # count x (B, width)


class Attention(nn.Module):
  """Multi-head self-attention with an optional relative position bias.

  Attributes:
    num_heads: number of heads.
    bias_rows: number of rows of the bias table; 0 for no bias (DiT).
    dtype: dtype of the products. The softmax is float32.
    forward_mode, sow_attention, attention_kernel: see `MDT`.
  """

  num_heads: int
  bias_rows: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False
  sow_attention: bool = False
  attention_kernel: str = "plain"

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], index: Int[Array, "#B K K"] | None
  ) -> Float[Array, "B K D"]:
    """Applies attention to x.

    Args:
      x: (B, K, D) tokens.
      index: (1 or B, K, K) row of the bias table for each (query, key) pair; None if
        bias_rows is 0.

    Returns:
      (B, K, D).
    """
    dim, options = x.shape[-1], dict(dtype=self.dtype, forward_mode=self.forward_mode)
    # A separate axis of heads can be sharded over devices.
    heads = (3, self.num_heads, dim // self.num_heads)
    qkv = linear(heads, "qkv", **options)(x)  # (B, K, 3, heads, D / heads)
    query, key, value = jnp.unstack(qkv, axis=2)
    query, key = self._with_positions(query, key, index)
    bias = None
    if self.bias_rows:
      assert index is not None
      # timm truncates this normal at 2, a hundred standard deviations away: no effect.
      shape = (self.bias_rows, self.num_heads)
      table = self.param("relative_position_bias", normal_init, shape, jnp.float32)
      bias = look_up(jnp.asarray(table), index)  # (1 or B, K, K, heads)
      bias = bias.transpose(0, 3, 1, 2)  # (1 or B, heads, K, K)
    if self.sow_attention and self.is_mutable_collection("intermediates"):
      weights = attention_weights(query, key, bias)  # (B, heads, K, K)
      self.sow("intermediates", "attention_weights", weights)
    kernel = kernel_for(self.attention_kernel, x.shape[1], bool(self.bias_rows))
    attend = plain_attention if self.forward_mode else KERNELS[kernel]
    out = attend(query, key, value, bias)  # (B, K, heads, D / heads)
    out = checkpoint_name(out, ATTENTION)
    return linear(dim, "proj", axis=(-2, -1), **options)(out)

  def _with_positions(
    self, query: Array, key: Array, index: Any
  ) -> tuple[Array, Array]:
    """Returns query and key (B, K, heads, D / heads); for subclasses."""
    del index
    return query, key


class Block(nn.Module):
  """A transformer block: optional long skip, attention and MLP, with adaLN-Zero.

  If the condition has tokens, cross-attention to them follows the attention.

  Attributes:
    num_heads, bias_rows, dtype: see `Attention`.
    forward_mode, sow_attention, attention_kernel: see `MDT`.
    mlp_ratio: hidden width of the MLP divided by D.
    emit: whether to return the output a second time, so that nn.scan stacks it.
  """

  num_heads: int
  mlp_ratio: float
  bias_rows: int
  emit: bool = False
  dtype: Dtype = jnp.float32
  forward_mode: bool = False
  sow_attention: bool = False
  attention_kernel: str = "plain"

  attention_class: ClassVar[type[Attention]] = Attention

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B K D"],
    c: Float[Array, "B E"] | Embedded,
    index: Int[Array, "#B K K"] | None,
    skip: Float[Array, "B K D"] | None = None,
  ) -> tuple[Array, Array | None]:
    dim, options = x.shape[-1], dict(dtype=self.dtype, forward_mode=self.forward_mode)
    x = shard_batch(x)
    if skip is not None:
      joined = jnp.concatenate([x, skip], axis=-1)  # (B, K, 2D)
      x = linear(dim, "skip", **options)(joined)
    modulation = Modulation(6, dim, **options, name="modulation")
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c)  # each (B, D)

    attend = self.attention_class(
      self.num_heads,
      self.bias_rows,
      **options,
      sow_attention=self.sow_attention,
      attention_kernel=self.attention_kernel,
      name="attention",
    )
    h = attend(modulated_norm(x, shift1, scale1), index)
    x = x + gate1[:, None] * h
    if isinstance(c, Embedded):
      cross = CrossAttention(self.num_heads, **options, name="cross_attention")
      x = x + cross(x, c.tokens, c.mask)

    h = modulated_norm(x, shift2, scale2)
    h = linear(int(dim * self.mlp_ratio), "fc1", **options)(h)
    h = linear(dim, "fc2", **options)(gelu(h))
    x = x + gate2[:, None] * h
    return x, (x if self.emit else None)


class FinalLayer(nn.Module):
  """Maps tokens to images: adaLN, then a zero-initialised linear map to patches."""

  patch_size: int
  out_channels: int
  grid_size: Size
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B K D"],
    c: Float[Array, "B E"] | Embedded,
    token_mask: TokenMask | None = None,
  ) -> Float[Array, "B H W C"]:
    """Maps all tokens, or the kept ones of a token mask; removed patches are zeros."""
    options = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    modulation = Modulation(2, x.shape[-1], **options, name="modulation")
    shift, scale = modulation(c)
    x = linear(
      self.patch_size**2 * self.out_channels,
      "linear",
      path="final_layer/",
      kernel_init=nn.initializers.zeros,
      **options,
    )(modulated_norm(x, shift, scale))  # (B, K, p p C)
    if token_mask is not None:
      x = restore_tokens(x, jnp.zeros(x.shape[-1]), token_mask)  # (B, L, p p C)
    return unpatchify(x, self.grid_size, self.patch_size)
