"""Blocks, embeddings and last layer of the released MicroDiT; see `microdit_text`.

Letters in shapes: see `microdit_text`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Shaped

from mdt_jax.models.attention import attention, plain_attention
from mdt_jax.models.blocks import Modulation
from mdt_jax.models.embeddings import MAX_PERIOD, unpatchify
from mdt_jax.models.experts import Experts, SwiGLU
from mdt_jax.models.layers import (
  ATTENTION,
  gelu,
  layer_norm,
  linear,
  normal_init,
  scaled_norm,
)
from mdt_jax.models.masking import TokenMask, restore_tokens
from mdt_jax.models.partitioning import shard_batch
from mdt_jax.sizes import Size
from mdt_jax.types import Array, Dtype

NUM_FREQUENCIES = 512  # of the timestep embedding; DiT has 256


class Attention(nn.Module):
  """Attention of tokens to themselves or to a caption, without biases.

  Queries and keys are normalised over the whole width, before the split into heads.

  Attributes:
    width: total width of the heads.
    head_size: width of a head.
    dtype, forward_mode: see `MicroDiTText`.
  """

  width: int
  head_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], captions: Float[Array, "B S D"] | None = None
  ) -> Float[Array, "B K D"]:
    options: dict[str, Any] = dict(
      dtype=self.dtype, forward_mode=self.forward_mode, use_bias=False
    )
    heads = (self.width // self.head_size, self.head_size)
    if captions is None:
      qkv = linear((3, *heads), "qkv", **options)(x)  # (B, K, 3, heads, head_size)
      query, key, value = jnp.unstack(qkv, axis=2)
    else:
      query = linear(heads, "query", **options)(x)
      key, value = jnp.unstack(
        linear((2, *heads), "key_value", **options)(captions), axis=2
      )
    query, key = (
      layer_norm(a.reshape(*a.shape[:2], -1)).reshape(a.shape) for a in (query, key)
    )
    attend = plain_attention if self.forward_mode else attention
    out = attend(query, key, value, None)  # (B, K, heads, head_size)
    out = checkpoint_name(out, ATTENTION)
    return linear(x.shape[-1], "proj", axis=(-2, -1), **options)(out)


class TextBlock(nn.Module):
  """A block: self-attention, cross-attention to a caption, and feed-forward layers.

  The self-attention and the feed-forward layers have adaLN-Zero, whose LayerNorms have
  weights. The cross-attention has no modulation and no gate.

  Attributes:
    attention_width: total width of the heads of the self-attention.
    mlp_width: hidden width of SwiGLU or of an expert.
    head_size: width of a head.
    num_experts: number of experts; 0 for SwiGLU.
    capacity: see `Experts`.
    dtype, forward_mode: see `MicroDiTText`.

  A block of the mixer receives tokens x and captions y of the width M instead of D. The
  width E of the condition c is that of the network in all blocks.
  """

  attention_width: int
  mlp_width: int
  head_size: int
  num_experts: int
  capacity: float
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B K D"], c: Float[Array, "B E"], y: Float[Array, "B S D"]
  ) -> Float[Array, "B K D"]:
    dim, options = x.shape[-1], dict(dtype=self.dtype, forward_mode=self.forward_mode)
    x = shard_batch(x)
    modulation = Modulation(6, dim, **options, activation=gelu, name="modulation")
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation(c))

    h = scaled_norm("norm1", self.dtype)(x) * (1 + scale1) + shift1
    attend = Attention(
      self.attention_width, self.head_size, **options, name="attention"
    )
    x = x + gate1 * attend(h)

    attend = Attention(dim, self.head_size, **options, name="cross_attention")
    x = x + attend(scaled_norm("norm2", self.dtype)(x), y)

    h = scaled_norm("norm3", self.dtype)(x) * (1 + scale2) + shift2
    if self.num_experts:
      sizes = self.num_experts, self.capacity, self.mlp_width
      h = Experts(*sizes, **options, name="experts")(h)
    else:
      h = SwiGLU(self.mlp_width, **options, name="mlp")(h)
    return x + gate2 * h


class CaptionBlock(nn.Module):
  """A block on the tokens of a caption: self-attention and SwiGLU, no modulation.

  Attributes:
    mlp_width: hidden width of SwiGLU.
    head_size: width of a head.
    dtype, forward_mode: see `MicroDiTText`.
  """

  mlp_width: int
  head_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    attend = Attention(y.shape[-1], self.head_size, **options, name="attention")
    y = y + attend(scaled_norm("norm1", self.dtype)(y))
    feed = SwiGLU(self.mlp_width, **options, name="mlp")
    return y + feed(scaled_norm("norm2", self.dtype)(y))


class TimestepEmbed(nn.Module):
  """Embeds times by NUM_FREQUENCIES sinusoids, then linear, GELU, linear.

  Attributes:
    hidden_size: D, width of the output.
    dtype, forward_mode: see `MicroDiTText`.
  """

  hidden_size: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, t: Shaped[Array, "B"]) -> Float[Array, "B D"]:
    half = NUM_FREQUENCIES // 2
    frequencies = (MAX_PERIOD ** -(np.arange(half) / half)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    options: dict[str, Any] = dict(
      path="timestep_embed/",
      kernel_init=normal_init,
      dtype=self.dtype,
      forward_mode=self.forward_mode,
    )
    h = linear(self.hidden_size, "fc1", **options)(waves.astype(self.dtype))
    return linear(self.hidden_size, "fc2", **options)(gelu(h))


class TextFinalLayer(nn.Module):
  """Maps tokens to images, as `mdt.FinalLayer`; its LayerNorm has weights.

  With a token mask, `mask_token` (p p C) fills the output at the removed tokens.
  """

  patch_size: int
  out_channels: int
  grid_size: Size
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B K D"],
    c: Float[Array, "B D"],
    mask_token: Float[Array, "P"],
    token_mask: TokenMask | None,
  ) -> Float[Array, "B H W C"]:
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    modulation = Modulation(
      2, x.shape[-1], **options, activation=gelu, name="modulation"
    )
    shift, scale = (m[:, None] for m in modulation(c))
    x = linear(
      self.patch_size**2 * self.out_channels,
      "linear",
      path="final_layer/",
      kernel_init=nn.initializers.zeros,
      **options,
    )(scaled_norm("norm", self.dtype)(x) * (1 + scale) + shift)  # (B, K, p p C)
    if token_mask is not None:
      x = restore_tokens(x, mask_token, token_mask)  # (B, L, p p C)
    return unpatchify(x, self.grid_size, self.patch_size)
