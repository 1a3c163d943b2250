"""Softmax attention with an additive bias and a hand-written gradient."""

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
  """Computes softmax(query key^T / sqrt(d) + bias) value for each head.

  The output equals that of jax.nn.dot_product_attention. The gradient is written by
  hand, after FlashAttention (arXiv 2205.14135, appendix B.4), and is faster than XLA's
  for two reasons. First, the output is divided by the sums of the softmax, instead of
  the weights: the output has K / d times fewer numbers. Second, a matrix product sums
  the gradient of a bias that all images share. jax.jvp is not supported; use
  `plain_attention`.

  Args:
    query, key, value: (B, K, H, d), float32 or bfloat16: B images, K tokens, H heads.
    bias: float32, added to the logits. Its first axis is 1 if all images share it.
      None: no bias.

  Returns:
    (B, K, H, d), of the dtype of `value`. Logits and softmax are float32.
  """
  return _forward(query, key, value, bias)[0]


def plain_attention(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  value: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B K H d"]:
  """Same as `attention`, but differentiated by JAX, so that jax.jvp works."""
  return _forward(query, key, value, bias)[0]


def attention_weights(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B H K K"]:
  """Computes softmax(query key^T / sqrt(d) + bias) in float32; see `attention`."""
  q, k = (x.swapaxes(1, 2) for x in (query, key))
  return jax.nn.softmax(_logits(q, k, bias), axis=-1)


def _logits(q: Array, k: Array, bias: Array | None) -> Array:
  """Computes q k^T / sqrt(d) + bias: q, k (B, H, K, d) -> (B, H, K, K) float32."""
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  return logits if bias is None else logits + bias


def _forward(
  query: Array, key: Array, value: Array, bias: Array | None
) -> tuple[Array, tuple[Any, ...]]:
  """Returns the output of `attention` and the values that `_backward` needs."""
  # (B, K, H, d) -> (B, H, K, d): one transpose here saves one in each product.
  q, k, v = (x.swapaxes(1, 2) for x in (query, key, value))
  logits = _logits(q, k, bias)
  # The softmax does not depend on `largest`, so its derivative is 0.
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
  """Computes the gradients of `attention` by query, key, value and bias."""
  q, k, v, bias, weights, total, out = kept
  d_out = gradient.swapaxes(1, 2)
  # `weights` are not divided by `total`. Dividing d_out instead divides d_value and
  # d_logits, which are linear in d_out.
  d_out = (d_out / total).astype(v.dtype)
  # d_value and d_key are computed as (d, K) and transposed at the end. If they were
  # computed as (K, d), XLA for CPUs would transpose the larger weights (K, K).
  d_value = jnp.einsum("bhqk,bhqd->bhdk", weights, d_out)
  d_weights = jnp.einsum(
    "bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32
  )
  # Softmax p: d_logits = p (d_p - sum(p d_p)), where sum(p d_p) = sum(d_out out).
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
  """Sums over axis 0: (B, …) -> (1, …). On CPUs a product is faster than jnp.sum."""
  return jnp.tensordot(jnp.ones((1, len(x)), x.dtype), x, axes=1)
