"""Feed-forward layers: SwiGLU, and a mixture of experts that choose their tokens.

Letters in shapes: B samples; K tokens of a sample; D width of a token; E experts; H
hidden width of an expert.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from mdt_jax.models.layers import LINEAR, linear
from mdt_jax.models.partitioning import gather, parameter_axes
from mdt_jax.types import Array, Dtype


class SwiGLU(nn.Module):
  """A gated feed-forward layer without biases: w3(silu(w1 x) w2 x).

  Attributes:
    width: hidden width.
    dtype, forward_mode: see `models.mdt.MDT`.
  """

  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K D"]:
    options: dict[str, Any] = dict(
      dtype=self.dtype, forward_mode=self.forward_mode, use_bias=False
    )
    gate, value = (linear(self.width, name, **options)(x) for name in ("w1", "w2"))
    return linear(x.shape[-1], "w3", **options)(nn.silu(gate) * value)


class Experts(nn.Module):
  """Feed-forward layers that choose their tokens (expert choice, arXiv 2202.09368).

  In each sample, an expert chooses the tokens whose probability for this expert is
  largest. The layer receives only the K kept tokens, so removed tokens do not compete.
  The output of a token is the sum of the outputs of the experts that chose the token,
  weighted by the probabilities; 0 if no expert chose the token.

  Attributes:
    num_experts: number of experts E.
    capacity: mean number of experts that choose a token: an expert chooses
      int(capacity K / E) tokens.
    width: hidden width H of an expert.
    dtype, forward_mode: see `models.mdt.MDT`.
  """

  num_experts: int
  capacity: float
  width: int
  dtype: Dtype = jnp.float32
  forward_mode: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B K D"]) -> Float[Array, "B K D"]:
    batch, length, dim = x.shape
    count = int(self.capacity * length / self.num_experts)
    router = linear(
      self.num_experts,
      "router",
      dtype=self.dtype,
      use_bias=False,
      forward_mode=self.forward_mode,
    )
    probabilities = jax.nn.softmax(router(x).astype(jnp.float32))  # (B, K, E)
    weights, ids = jax.lax.top_k(probabilities.swapaxes(1, 2), count)  # (B, E, count)
    rows = jnp.arange(batch)[:, None, None]
    h = x[rows, ids]  # (B, E, count, D)
    w1 = self._matrix("expert_in", (self.num_experts, dim, self.width))
    w2 = self._matrix("expert_out", (self.num_experts, self.width, dim))
    h = checkpoint_name(jnp.einsum("becd,edh->bech", h, w1), LINEAR)
    h = nn.gelu(h, approximate=False)
    h = checkpoint_name(jnp.einsum("bech,ehd->becd", h, w2), LINEAR)
    h = h * weights[..., None].astype(self.dtype)
    return jnp.zeros_like(h, shape=x.shape).at[rows, ids].add(h)

  def _matrix(self, name: str, shape: tuple[int, ...]) -> Array:
    """Creates the parameter `name`, one matrix for each expert."""
    init = nn.initializers.xavier_uniform(batch_axis=0)
    matrix = jnp.asarray(self.param(name, init, shape, jnp.float32), self.dtype)
    return gather(matrix, parameter_axes(name))
