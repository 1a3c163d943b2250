"""Attention with a bias, and its gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def attention(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
  """softmax(query key^T / sqrt(d) + bias) value, for each head.

  As jax.nn.dot_product_attention. The gradient is written out, after FlashAttention
  (arXiv 2205.14135, B.4), for two things that XLA would do otherwise: the weights are
  divided by their sums only where that is K times as cheap, in the output; and the
  gradient of a bias that images share is summed by a product.

  Args:
    query, key, value: (B, K, H, d), float32 or bfloat16.
    bias: (1 or B, H, K, K) float32, added to the logits; None for none.

  Returns:
    (B, K, H, d), of the type of `value`; logits and softmax are in float32.
  """
  return _forward(query, key, value, bias)[0]


def _forward(
  query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, tuple[Any, ...]]:
  # Heads beside the batch, once, instead of in each product.
  q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  if bias is not None:
    logits = logits + bias
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
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
  # The weights are still to be divided by their sums; so is everything below.
  d_out = (d_out / total).astype(v.dtype)
  # Gradients of values and keys are made as (d, K) and transposed last: made as (K, d),
  # XLA for CPUs transposes the weights (K, K) instead.
  d_value = jnp.einsum("bhqk,bhqd->bhdk", weights, d_out)
  d_weights = jnp.einsum(
    "bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32
  )
  # What a row of weights has in common, and which changes none, as they sum to one.
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
  return *(x.swapaxes(1, 2) for x in (d_query, d_key, d_value)), d_bias


attention.defvjp(_forward, _backward)


def _sum_of_batch(x: Array) -> Array:
  """(B, …) -> (1, …), as a product: XLA's sum takes CPUs several times as long."""
  return jnp.tensordot(jnp.ones((1, len(x)), x.dtype), x, axes=1)
