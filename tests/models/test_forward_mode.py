"""`forward_mode`: networks that support jax.jvp."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.models.attention import attention, plain_attention
from mdt_jax.models.masking import random_token_mask
from tests import reference

DEPTHS = {"DiT": (2, 1), "MDT": (3, 2), "MDTv2": (4, 2)}
CASES = [
  ("DiT", False),
  ("MDT", True),
  ("MDTv2", False),
  ("MDTv2", True),
]
KEYS = jax.random.split(jax.random.key(0), 3)
X, V = (jax.random.normal(key, (2, 8, 8, 4)) for key in KEYS[:2])
# Small times, as float32 rounds the sinusoids of large times too coarsely for finite
# differences.
T, V_T = jnp.array([3.0, 7.5]), jnp.array([0.5, -1.0])
Y = jnp.array([1, 2])
MASK = random_token_mask(KEYS[2], 2, 16, 6)


@functools.cache
def params_of(variant):
  return reference.random_params(make(variant, False))


def make(variant, forward_mode, **attributes):
  depth, decode_depth = DEPTHS[variant]
  return create_model(
    variant=variant,
    input_size=8,
    hidden_size=16,
    num_heads=2,
    num_classes=10,
    depth=depth,
    decode_depth=decode_depth,
    forward_mode=forward_mode,
    **attributes,
  )


def function_of(model, masked):
  """Returns the function (x, t) -> output."""
  params, mask = params_of(model.variant), MASK if masked else None
  return lambda x, t: model.apply({"params": params}, x, t, Y, mask)


@functools.cache
def derivative(variant, masked, **attributes):
  """(output, derivative along (V, V_T)), by jax.jvp."""
  f = function_of(make(variant, True, **attributes), masked)
  return jax.jit(lambda: jax.jvp(f, (X, T), (V, V_T)))()


@pytest.mark.parametrize(("variant", "masked"), CASES)
def test_jvp_matches_finite_differences(variant, masked):
  f, step = jax.jit(function_of(make(variant, False), masked)), 1e-2
  after, before = (f(X + h * V, T + h * V_T) for h in (step, -step))
  difference = np.asarray(after - before) / (2 * step)
  _, tangent = derivative(variant, masked)
  assert float(abs(difference).max()) > 0.1
  assert reference.relative_error(tangent, difference) < 2e-3


@pytest.mark.parametrize(("variant", "masked"), CASES)
def test_jvp_matches_double_vjp(variant, masked):
  f = function_of(make(variant, False), masked)

  @jax.jit
  def twice(x, t, v):
    out, pull = jax.vjp(f, x, t)
    return out, jax.vjp(pull, jnp.zeros_like(out))[1](v)[0]

  for found, expected in zip(
    derivative(variant, masked), twice(X, T, (V, V_T)), strict=True
  ):
    assert reference.relative_error(found, np.asarray(expected)) < 1e-5


@pytest.mark.parametrize("unroll", [1, -1])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_jvp_does_not_depend_on_remat_and_unroll(remat, unroll):
  _, found = derivative("MDTv2", True, remat=remat, unroll=unroll)
  _, expected = derivative("MDTv2", True)
  assert reference.relative_error(found, np.asarray(expected)) < 1e-5


def test_jvp_fails_without_forward_mode():
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(function_of(make("MDT", False), False), (X, T), (V, V_T))


def loss_of(variant, forward_mode, masked):
  model, mask = make(variant, forward_mode), MASK if masked else None
  return lambda params, x: (model.apply({"params": params}, x, T, Y, mask) ** 2).mean()


def loss(params, model):
  mask = MASK if model.takes_mask else None
  return (model.apply({"params": params}, X, T, Y, mask) ** 2).mean()


@functools.cache
def gradient(variant, forward_mode):
  function = functools.partial(loss, model=make(variant, forward_mode))
  return jax.jit(jax.grad(function))(params_of(variant))


@pytest.mark.parametrize("variant", DEPTHS)
def test_forward_mode_does_not_change_reverse_gradients(variant):
  found, expected = gradient(variant, True), gradient(variant, False)
  largest = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, expected
  )


@pytest.mark.parametrize("variant", DEPTHS)
def test_jvp_along_parameters_matches_the_gradient(variant):
  model = make(variant, True)
  along = reference.random_params(model, seed=1)
  function = functools.partial(loss, model=model)
  jvp = jax.jit(lambda params: jax.jvp(function, (params,), (along,))[1])
  tangent = jvp(params_of(variant))
  product = jax.tree.map(lambda g, v: (g * v).sum(), gradient(variant, False), along)
  parts = np.array(jax.tree.leaves(product))
  assert abs(float(tangent) - parts.sum()) < 1e-5 * abs(parts).sum()


def test_plain_attention_equals_attention_bit_for_bit():
  keys = jax.random.split(jax.random.key(0), 4)
  arguments = [jax.random.normal(key, (3, 20, 2, 8)) for key in keys[:3]]
  bias = jax.random.normal(keys[3], (1, 2, 20, 20))
  np.testing.assert_array_equal(
    jax.jit(plain_attention)(*arguments, bias), jax.jit(attention)(*arguments, bias)
  )
