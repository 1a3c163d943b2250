"""Softmax attention with an additive bias: plain products, or fused kernels.

`KERNELS` lists the implementations by name. All compute the same function; they differ
in speed, in memory and in where they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.logs import logger
from mdt_jax.models import pallas_attention
from mdt_jax.types import Array, Dtype


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


def cudnn_attention(
  query: Float[Array, "B K H d"],
  key: Float[Array, "B K H d"],
  value: Float[Array, "B K H d"],
  bias: Float[Array, "#B H K K"] | None,
) -> Float[Array, "B K H d"]:
  """Same as `attention`, by the fused kernel of cuDNN, on NVIDIA GPUs.

  The kernel writes no (K, K) weights to memory. It gives no gradient to a bias that
  differs between images; that gradient is computed apart, from weights that are
  computed again.

  Args:
    query, key, value: (B, K, H, d), bfloat16 or float16; see `check_kernel`.
    bias: see `attention`; the kernel rounds the bias to the dtype of `query`.

  Raises:
    SettingError: setting "attention_kernel": the kernel does not run the dtype, the
      width of a head, or an odd number of tokens with a bias.
  """
  check_kernel("cudnn", query.dtype, query.shape[-1])
  if bias is None:
    return _cudnn(query, key, value, None)
  if needed := needed_tokens("cudnn", query.shape[1], has_bias=True):
    raise SettingError("attention_kernel", "cudnn", f"{needed}, has {query.shape[1]}")
  if len(bias) == 1:
    return _cudnn(query, key, value, bias)
  return _cudnn_with_own_bias(query, key, value, bias)


def _cudnn(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
  """Attention by cuDNN; the gradient of a bias is right only if images share it."""
  rounded = None if bias is None else bias.astype(query.dtype)
  return jax.nn.dot_product_attention(
    query, key, value, bias=rounded, implementation="cudnn"
  )


@jax.custom_vjp
def _cudnn_with_own_bias(query: Array, key: Array, value: Array, bias: Array) -> Array:
  """Attention by cuDNN with a bias (B, H, K, K) for each image."""
  return _cudnn(query, key, value, bias)


def _own_bias_forward(
  query: Array, key: Array, value: Array, bias: Array
) -> tuple[Array, tuple[Any, ...]]:
  """Returns the output of `_cudnn_with_own_bias` and what its gradient needs."""
  out, pull = jax.vjp(lambda q, k, v: _cudnn(q, k, v, bias), query, key, value)
  return out, (pull, query, key, value, bias, out)


def _own_bias_backward(
  kept: tuple[Any, ...], gradient: Array
) -> tuple[Array, Array, Array, Array]:
  """Computes the gradients by query, key and value (cuDNN), and by the bias."""
  pull, query, key, value, bias, out = kept
  q, k, v, out, d_out = (
    x.swapaxes(1, 2) for x in (query, key, value, out, gradient)
  )  # (B, H, K, d)
  rounded = bias.astype(query.dtype).astype(jnp.float32)  # as the kernel read it
  weights = jax.nn.softmax(_logits(q, k, rounded), axis=-1)
  d_weights = jnp.einsum(
    "bhqd,bhkd->bhqk", d_out, v, preferred_element_type=jnp.float32
  )
  common = (d_out * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
  return *pull(gradient), weights * (d_weights - common)


_cudnn_with_own_bias.defvjp(_own_bias_forward, _own_bias_backward)

# Name -> function with the arguments of `attention`.
KERNELS: dict[str, Callable[..., Array]] = {
  "plain": attention,
  "cudnn": cudnn_attention,
  "pallas": pallas_attention.pallas_attention,
}
MAX_CUDNN_WIDTH = 128  # of a head; 256 only on Hopper and later
MIN_CAPABILITY = 8.0  # of a GPU for cuDNN's kernel: Ampere
# Name of a kernel -> platforms of `jax.Device`, and their name. Others run anywhere.
# The platform of a GPU that is compiled for, but is not there, is "cuda".
PLATFORMS = {
  "cudnn": (("gpu", "cuda"), "NVIDIA GPUs"),
  "pallas": (("tpu",), "TPUs"),
}


def check_kernel(kernel: str, dtype: Dtype, head_width: int) -> None:
  """Raises SettingError unless a kernel runs heads of a width in a dtype.

  Args:
    kernel: a key of KERNELS.
    dtype: dtype of query, key and value.
    head_width: d.
  """
  check_choice("attention_kernel", kernel, KERNELS)
  if kernel != "cudnn":
    return
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    accepted = f"needs dtype = bfloat16, has {jnp.dtype(dtype)}"
    raise SettingError("attention_kernel", kernel, accepted)
  if head_width % 8 or head_width > MAX_CUDNN_WIDTH:
    accepted = (
      f"needs a width of a head divisible by 8 and at most {MAX_CUDNN_WIDTH}, has "
      f"{head_width}"
    )
    raise SettingError("attention_kernel", kernel, accepted)


def device_problem(kernel: str, device: Any) -> str | None:
  """Says which devices a kernel needs; None if it runs on this one.

  Args:
    kernel: a key of KERNELS.
    device: a `jax.Device`.
  """
  if kernel not in PLATFORMS:
    return None
  platforms, name = PLATFORMS[kernel]
  kind = getattr(device, "device_kind", device.platform)
  # AMD's GPUs have the platform of NVIDIA's.
  if device.platform not in platforms or kind.startswith("AMD"):
    return f"needs {name}, the devices are {kind}"
  if kernel == "cudnn":
    capability = getattr(device, "compute_capability", "unknown")
    try:
      is_enough = float(capability) >= MIN_CAPABILITY
    except ValueError:  # of an AMD GPU, or unknown
      is_enough = False
    if not is_enough:
      return f"needs compute capability {MIN_CAPABILITY}, {kind} has {capability}"
  return None


def needed_tokens(
  kernel: str, tokens: int, has_bias: bool, device: Any = None
) -> str | None:
  """Says which numbers of tokens a kernel needs; None if it runs these.

  Args:
    kernel: a key of KERNELS.
    tokens: K.
    has_bias: whether there is a bias.
    device: a `jax.Device`; None for no limit of a chip.
  """
  if kernel == "cudnn" and has_bias and tokens % 2:
    return "needs even numbers of tokens beside a bias"
  if kernel == "pallas" and pallas_attention.rows_of(tokens) is None:
    return f"needs {pallas_attention.TOKENS}"
  kind = getattr(device, "device_kind", "")
  if kernel == "pallas" and tokens > (most := pallas_attention.most_tokens(kind)):
    return f"needs at most {most} tokens on {kind}"
  return None


@functools.cache
def kernel_for(kernel: str, tokens: int, has_bias: bool) -> str:
  """Returns the kernel of a pass: plain if `kernel` does not run this number of tokens.

  Training refuses such numbers when it starts. Inpainting and guidance keep numbers of
  tokens that training does not know; for them the log says once that it is plain.

  Args:
    kernel, tokens, has_bias: see `needed_tokens`.
  """
  if needed := needed_tokens(kernel, tokens, has_bias):
    text = "attention of %d tokens by plain products: %s %s"
    logger.info(text, tokens, kernel, needed)
    return "plain"
  return kernel


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
