"""Linear layers, and the order of factors in their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.partitioning import product


@pytest.mark.parametrize(
  "x_shape, kernel_shape, count",
  [
    ((2, 5, 6), (6, 4), 1),
    ((2, 5, 4), (4, 6), 1),
    ((2, 5, 6), (6, 3, 2, 4), 1),
    ((2, 5, 3, 4), (3, 4, 7), 2),
  ],
)
def test_product_and_its_gradients_equal_tensordot(x_shape, kernel_shape, count):
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
