"""Layers of conditions that are arrays: vectors, and sequences of tokens.

Letters in shapes: B samples; D width of the network; V width of the arrays; S tokens of
a condition; K tokens of an image.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from mdt_jax.models.attention import plain_attention
from mdt_jax.models.embeddings import CaptionMlp
from mdt_jax.models.layers import (
  ATTENTION,
  layer_norm,
  linear,
  normal_init,
  scaled_norm,
)
from mdt_jax.types import Array, Dtype

MASKED = -1e9  # added to the logits of tokens that are no part of a condition


class Embedded(flax.struct.PyTreeNode):
  """An embedded condition that the blocks read token by token.

  Networks pass it to their blocks in place of the vector c (B, D). Layers that need one
  vector read `pooled`.

  Attributes:
    pooled: (B, D) vector of the whole condition, and of the timestep.
    tokens: (B, S, D) tokens for the cross-attention of the blocks.
    mask: (B, S) True for the tokens of a condition, False for padding; at least one
      token of each sample is True.
  """

  pooled: Float[Array, "B D"]
  tokens: Float[Array, "B S D"]
  mask: Bool[Array, "B S"]


def add_embedded(c: Array | Embedded, other: Array | Embedded) -> Array | Embedded:
  """Adds the vectors of two embedded conditions, of which one may have tokens."""
  if isinstance(c, Embedded):
    assert not isinstance(other, Embedded), "only one condition may have tokens"
    return c.replace(pooled=c.pooled + other)
  if isinstance(other, Embedded):
    return other.replace(pooled=c + other.pooled)
  return c + other


def pooled_of(c: Array | Embedded) -> Array:
  """Returns the vector (B, D) of an embedded condition."""
  return c.pooled if isinstance(c, Embedded) else c


class VectorEmbed(nn.Module):
  """Embeds vectors: LayerNorm with weights, linear, SiLU, linear.

  The last layer and the null vector start at zero, so that a network with a new vector
  condition computes at first what it computed without.

  Attributes:
    hidden_size: D.
    has_null: whether there is a learned embedding of the null condition.
    norm: whether to apply LayerNorm, which makes embeddings of all encoders alike but
      removes the scale of a vector.
    dtype: dtype of the products.
  """

  hidden_size: int
  has_null: bool
  norm: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, y: Float[Array, "B V+1"]) -> Float[Array, "B D"]:
    """Maps vectors, whose last number is 1, or 0 for the null condition."""
    options: dict[str, Any] = dict(path="vector_embed/", dtype=self.dtype)
    vector = y[:, :-1].astype(self.dtype)
    if self.norm:
      vector = scaled_norm("norm", self.dtype)(vector)
    hidden = nn.silu(linear(self.hidden_size, "fc1", **options)(vector))
    zeros = nn.initializers.zeros
    out = linear(self.hidden_size, "fc2", kernel_init=zeros, **options)(hidden)
    if not self.has_null:
      return out
    null = self.param("null", zeros, (self.hidden_size,), jnp.float32)
    return jnp.where(y[:, -1:] > 0, out, null.astype(self.dtype))


class TokensEmbed(nn.Module):
  """Embeds sequences of tokens: an MLP for each token, and the mean of all.

  The mean of the tokens is mapped by a linear layer that starts at zero, and becomes a
  part of the vector that modulates the blocks, as in PixArt (arXiv 2310.00426) and
  MicroDiT. The null condition is one learned token.

  Attributes:
    hidden_size: D.
    has_null: whether there is a learned token of the null condition.
    dtype: dtype of the products.
  """

  hidden_size: int
  has_null: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, y: Float[Array, "B S V+1"]) -> Embedded:
    """Maps tokens, whose last number is 1, or 0 for padding."""
    mask = y[..., -1] > 0  # (B, S)
    mlp = CaptionMlp(self.hidden_size, self.dtype, name="mlp")
    tokens = mlp(y[..., :-1].astype(self.dtype))  # (B, S, D)
    # A condition without tokens is the null condition.
    is_first = (jnp.arange(y.shape[1]) == 0) & ~mask.any(axis=1, keepdims=True)
    if self.has_null:
      null = self.param("null", normal_init, (self.hidden_size,), jnp.float32)
      tokens = jnp.where(is_first[..., None], null.astype(self.dtype), tokens)
    mask = mask | is_first
    weights = mask / mask.sum(axis=1, keepdims=True)
    mean = jnp.einsum("bs,bsd->bd", weights.astype(self.dtype), tokens)
    pool = linear(
      self.hidden_size,
      "pool",
      path="tokens_embed/",
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )
    return Embedded(pool(mean), tokens, mask)


class CrossAttention(nn.Module):
  """Multi-head attention of the tokens of an image to those of a condition.

  The output layer starts at zero, as in PixArt.

  Attributes:
    num_heads: number of heads.
    dtype, forward_mode: see `MDT`. The softmax is float32.
  """

  num_heads: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B K D"],
    tokens: Float[Array, "B S E"],
    mask: Bool[Array, "B S"],
  ) -> Float[Array, "B K D"]:
    dim = x.shape[-1]
    options: dict[str, Any] = dict(dtype=self.dtype, forward_mode=self.forward_mode)
    heads = (self.num_heads, dim // self.num_heads)
    query = linear(heads, "query", **options)(layer_norm(x))  # (B, K, heads, d)
    both = linear((2, *heads), "key_value", **options)(tokens)
    key, value = jnp.unstack(both, axis=2)  # (B, S, heads, d)
    bias = jnp.where(mask, 0.0, MASKED)[:, None, None]  # (B, 1, 1, S)
    out = plain_attention(query, key, value, bias)  # (B, K, heads, d)
    out = checkpoint_name(out, ATTENTION)
    zeros = nn.initializers.zeros
    return linear(dim, "proj", axis=(-2, -1), kernel_init=zeros, **options)(out)
