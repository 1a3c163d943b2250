"""Attention and its custom gradient, compared with jax.nn.dot_product_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.attention import attention

SHAPE = (3, 20, 2, 8)  # Images, tokens, heads, width of a head.


def inputs(bias_batch: int, dtype: str = "float32") -> list[jax.Array | None]:
  keys = jax.random.split(jax.random.key(0), 5)
  qkv = [2 * jax.random.normal(key, SHAPE, dtype) for key in keys[:3]]
  _, tokens, heads, _ = SHAPE
  bias = None
  if bias_batch:
    bias = 2 * jax.random.normal(keys[3], (bias_batch, heads, tokens, tokens))
  return [*qkv, bias]


def value_and_gradients(function, arguments):
  weights = jax.random.normal(jax.random.key(1), SHAPE)

  def total(*arguments):
    out = function(*arguments)
    return (out.astype(jnp.float32) * weights).sum(), out

  argnums = tuple(i for i, x in enumerate(arguments) if x is not None)
  gradients, out = jax.jit(jax.grad(total, argnums, has_aux=True))(*arguments)
  return [out, *gradients]


def standard(query, key, value, bias):
  return jax.nn.dot_product_attention(query, key, value, bias=bias)


@pytest.mark.parametrize("bias_batch", [0, 1, SHAPE[0]])
def test_attention_matches_dot_product_attention(bias_batch):
  arguments = inputs(bias_batch)
  found = value_and_gradients(attention, arguments)
  expected = value_and_gradients(standard, arguments)
  assert len(found) == (5 if bias_batch else 4)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()))


def test_bfloat16_attention_is_exact_up_to_rounding():
  arguments = inputs(1, "bfloat16")
  found = value_and_gradients(attention, arguments)
  exact = [None if x is None else x.astype(jnp.float32) for x in arguments]
  for a, b, x in zip(
    found, value_and_gradients(standard, exact), [arguments[0], *arguments], strict=True
  ):
    assert a.dtype == x.dtype
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, atol=2e-2 * float(abs(b).max())
    )


@pytest.mark.parametrize("bias", [300.0, -300.0])
def test_large_logits_give_finite_gradients(bias):
  query, key, value, _ = inputs(0)
  tokens = SHAPE[1]
  bias = jnp.zeros((1, SHAPE[2], tokens, tokens)).at[..., 0].set(bias)
  arguments = [30 * query, 30 * key, value, bias]
  found = value_and_gradients(attention, arguments)
  expected = value_and_gradients(standard, arguments)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * max(1, float(abs(b).max())))
