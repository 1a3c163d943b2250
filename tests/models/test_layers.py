"""Layers shared by the networks: linear maps, LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.layers import layer_norm, linear, product


@pytest.mark.parametrize(
  "x_shape, kernel_shape, count",
  [
    ((2, 5, 6), (6, 4), 1),
    ((2, 5, 4), (4, 6), 1),
    ((2, 5, 6), (6, 3, 2, 4), 1),
    ((2, 5, 3, 4), (3, 4, 7), 2),
  ],
)
def test_product_and_its_gradients_match_tensordot(x_shape, kernel_shape, count):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], x_shape)
  kernel = jax.random.normal(keys[1], kernel_shape)
  weights = jax.random.normal(keys[2], x_shape[:-count] + kernel_shape[count:])

  def gradients(function):
    total = lambda x, kernel: (function(x, kernel, count) * weights).sum()  # noqa: E731
    return [function(x, kernel, count), *jax.grad(total, (0, 1))(x, kernel)]

  for a, b in zip(gradients(product), gradients(jnp.tensordot), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_linear_multiplies_by_the_kernel_and_adds_the_bias():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
  layer = linear(7, "proj", axis=(-2, -1), dtype=jnp.float32)
  kernel = jax.random.normal(jax.random.key(1), (3, 4, 7))
  bias = jnp.arange(7.0)
  out = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
  expected = jnp.einsum("bkhd,hdo->bko", x, kernel) + bias
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_layer_norm_uses_epsilon_1e_6_and_the_biased_variance():
  x = np.array([[1e-3, 3e-3, -2e-3, 4e-3]], np.float32)
  expected = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
  np.testing.assert_allclose(layer_norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_layer_norm_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(100 + np.arange(8.0) / 2, jnp.bfloat16)[None]
  expected = layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(layer_norm(x), expected)
