"""Softmax attention with a bias, and its gradient written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.types import Array


@jax.custom_vjp
def attention(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  value: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B K H d"]:
  """softmax(query key^T / sqrt(d) + bias) value, for each head.

  Equals jax.nn.dot_product_attention. The gradient is written out, after FlashAttention
  (arXiv 2205.14135, B.4). It is faster than XLA's in two places: the division by the
  sums of the softmax is applied to the output, which has K / d times fewer numbers than
  the weights; and the gradient of a bias that images share is summed by a product.

  Args:
    query, key, value: float32 or bfloat16.
    bias: float32, added to the logits; with a first axis of 1 where images share it.

  Returns:
    The type of `value`. Logits and softmax are float32.
  """
  return _forward(query, key, value, bias)[0]


def plain_attention(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  value: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B K H d"]:
  """As `attention`, without the written-out gradient, so that jax.jvp works."""
  return _forward(query, key, value, bias)[0]


def attention_weights(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B H K K"]:
  """softmax(query key^T / sqrt(d) + bias), float32: see `attention`."""
  q, k = (x.swapaxes(1, 2) for x in (query, key))
  return jax.nn.softmax(_logits(q, k, bias), axis=-1)


def _logits(q: Array, k: Array, bias: Array | None) -> Array:
  """q k^T / sqrt(d) + bias: (B, H, K, d) twice -> (B, H, K, K) float32."""
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  return logits if bias is None else logits + bias


def _forward(
  query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, tuple[Any, ...]]:
  # (B, K, H, d) -> (B, H, K, d): transposed once, instead of in each product.
  q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
  logits = _logits(q, k, bias)
  # The largest logit cancels, so its derivative is left out.
  largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  weights = jnp.exp(logits - largest)
  total = weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(v.dtype)
  out = jnp.einsum("bhqk,bhkd->bhqd", weights, v, preferred_element_type=jnp.float32)
  out = (out / total).astype(v.dtype)
  return out.swapaxes(1, 2), (q, k, v, bias, weights, total, out)


def _backward(
  kept: tuple[Any, ...], gradient: Array
) -> tuple[Array, Array, Array, Array | None]:
  q, k, v, bias, weights, total, out = kept
  d_out = gradient.swapaxes(1, 2)
  # `weights` lack the division by `total`: dividing d_out divides all that follows.
  d_out = (d_out / total).astype(v.dtype)
  # The gradients of values and keys are computed as (d, K) and transposed at the end.
  # Computed as (K, d), XLA for CPUs would transpose the weights (K, K) instead.
  d_value = jnp.einsum("bhqk,bhqd->bhdk", weights, d_out)
  d_weights = jnp.einsum(
    "bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32
  )
  # The part that a row of weights shares cancels, because the row sums to one.
  common = (d_out * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
  d_logits = weights * (d_weights - common)
  rounded = d_logits.astype(q.dtype)
  scale = q.shape[-1] ** -0.5
  d_query = jnp.einsum("bhqk,bhkd->bhqd", rounded, k) * scale
  d_key = jnp.einsum("bhqk,bhqd->bhdk", rounded, q) * scale
  d_bias = None
  if bias is not None:
    d_bias = d_logits if len(bias) == len(d_logits) else _sum_of_batch(d_logits)
  d_key, d_value = (x.swapaxes(2, 3) for x in (d_key, d_value))
  d_query, d_key, d_value = (x.swapaxes(1, 2) for x in (d_query, d_key, d_value))
  return d_query, d_key, d_value, d_bias


attention.defvjp(_forward, _backward)


def _sum_of_batch(x: Array) -> Array:
  """(B, …) -> (1, …), as a product, which is several times as fast on CPUs as a sum."""
  return jnp.tensordot(jnp.ones((1, len(x)), x.dtype), x, axes=1)
