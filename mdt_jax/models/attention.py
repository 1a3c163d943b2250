"""Attention that keeps no weights for the backward pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def attention(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
  """softmax(query key^T / sqrt(d) + bias) value, for each head.

  The backward pass computes the weights again, from the logarithm of their sums, as
  FlashAttention does (arXiv 2205.14135): to keep (B, H, K, K) numbers a block costs
  more memory, and on CPUs more time, than one product of six.

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
  logits = _logits(q, k, bias)
  largest = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp(logits - largest)
  total = weights.sum(axis=-1, keepdims=True)
  out = jnp.einsum(
    "bhqk,bhkd->bhqd",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  out = (out / total).astype(v.dtype)
  log_total = largest + jnp.log(total)
  return out.swapaxes(1, 2), (q, k, v, bias, out, log_total)


def _backward(
  kept: tuple[Any, ...], out_gradient: Array
) -> tuple[Array, Array, Array, Array | None]:
  q, k, v, bias, out, log_total = kept
  d_out = out_gradient.swapaxes(1, 2)
  scale = q.shape[-1] ** -0.5
  weights = jnp.exp(_logits(q, k, bias) - log_total)
  d_weights = jnp.einsum(
    "bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32
  )
  # What a row of the weights takes up of its own gradient, as they sum to one.
  common = (d_out * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
  d_logits = weights * (d_weights - common)
  rounded = d_logits.astype(q.dtype)
  d_query = jnp.einsum("bhqk,bhkd->bhqd", rounded, k) * scale
  d_key = jnp.einsum("bhqk,bhqd->bhkd", rounded, q) * scale
  d_value = jnp.einsum("bhqk,bhqd->bhkd", weights.astype(v.dtype), d_out)
  d_bias = None
  if bias is not None:
    d_bias = d_logits if bias.shape[0] > 1 else _sum_of_batch(d_logits)
  return *(x.swapaxes(1, 2) for x in (d_query, d_key, d_value)), d_bias


attention.defvjp(_forward, _backward)


def _logits(q: Array, k: Array, bias: Array | None) -> Array:
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  return logits if bias is None else logits + bias


def _sum_of_batch(x: Array) -> Array:
  """(B, …) -> (1, …), as a product: XLA's sum takes CPUs several times as long."""
  return jnp.tensordot(jnp.ones((1, len(x)), x.dtype), x, axes=1)
