"""Sampling loops: agreement with the released code, and properties of any network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.samplers import sample
from mdt_jax.diffusion.schedules import make_betas
from mdt_jax.errors import SettingError
from tests import reference
from tests.diffusion import toy

X_T = toy.recorded("loop/z")
METHODS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)]


@functools.cache
def sampler(method="ddpm", eta=0.0, clip_denoised=False, spacing="10"):
  """Returns a compiled function (x_T, key, noise) -> x_0 of the recorded network."""
  diffusion = GaussianDiffusion.create(spacing=spacing)
  return jax.jit(
    lambda x, key, noise=None: sample(
      toy.network,
      diffusion,
      x,
      key,
      method=method,
      eta=eta,
      clip_denoised=clip_denoised,
      noise=noise,
    )
  )


@pytest.mark.parametrize(
  ("method", "eta", "name"),
  [("ddpm", 0.0, "ddpm"), ("ddim", 0.0, "ddim_eta0"), ("ddim", 1.0, "ddim_eta1")],
)
def test_sampling_loop_matches_reference(method, eta, name):
  noise = None
  if f"loop/{name}_noise" in toy.RECORDED:
    noise = toy.recorded(f"loop/{name}_noise")
  x_0 = sampler(method, eta)(X_T, jax.random.key(0), noise)
  reference.assert_matches(
    f"{method.upper()}, whole loop of 10 steps, eta {eta:g}"
    if method == "ddim"
    else "DDPM, whole loop of 10 steps",
    x_0,
    toy.recorded(f"loop/{name}"),
    reference.LOOP_TOLERANCE,
  )


@pytest.mark.parametrize(
  ("spacing", "method", "eta"),
  [("7", *method) for method in METHODS] + [("1", "ddpm", 0.0), ("1", "ddim", 1.0)],
)
def test_perfect_network_samples_its_image(spacing, method, eta):
  image = toy.recorded("x0")[:2]
  diffusion = GaussianDiffusion.create(
    prediction="x0", variance="fixed_small", spacing=spacing
  )
  x_0 = sample(
    lambda x, t: jnp.asarray(image),
    diffusion,
    X_T,
    jax.random.key(0),
    method=method,
    eta=eta,
  )
  np.testing.assert_allclose(x_0, image, atol=1e-5)


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_samplers_keep_the_variance_of_normal_images(method, eta):
  """For x0 ~ N(0, 1) the optimal network is known, and samples must be N(0, 1)."""
  diffusion = GaussianDiffusion.create(prediction="x0", variance="fixed_large")
  signal = jnp.asarray(np.sqrt(diffusion.alphas_cumprod), jnp.float32)

  def posterior_mean(x, t):
    return signal[t][:, None, None, None] * x

  x_T = jax.random.normal(jax.random.key(0), (4, 16, 16, 4))
  x_0 = jax.jit(
    lambda key: sample(posterior_mean, diffusion, x_T, key, method=method, eta=eta)
  )(jax.random.key(1))
  np.testing.assert_allclose(x_0.std(), 1, atol=0.05)


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_clipping_keeps_samples_in_range(method, eta):
  x_0 = sampler(method, eta, clip_denoised=True)(3 * X_T, jax.random.key(0))
  np.testing.assert_allclose(jnp.abs(x_0).max(), 1, atol=1e-6)


# Random numbers.


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_another_key_gives_a_different_sample(method, eta):
  first, second = (sampler(method, eta)(X_T, jax.random.key(i)) for i in range(2))
  assert jnp.abs(first - second).max() > 0.1


def test_ddim_with_eta_zero_does_not_depend_on_the_key():
  first, second = (sampler("ddim", 0.0)(X_T, jax.random.key(i)) for i in range(2))
  np.testing.assert_array_equal(first, second)


def test_samples_of_one_batch_get_different_noise():
  same = np.broadcast_to(X_T[:1], X_T.shape)
  x_0 = sampler()(same, jax.random.key(0))
  assert jnp.abs(x_0[0] - x_0[1]).max() > 0.1


@pytest.mark.parametrize("place", [0, 1, 3])
def test_sample_with_its_own_key_does_not_depend_on_the_batch(place):
  keys = jax.random.split(jax.random.key(0), 4)
  noise = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
  whole = sampler()(noise, keys)
  alone = sampler()(noise[place : place + 1], keys[place : place + 1])
  np.testing.assert_allclose(alone[0], whole[place], atol=1e-6)


def test_last_step_adds_no_noise():
  noise = toy.recorded("loop/ddpm_noise").copy()
  expected = sampler()(X_T, jax.random.key(0), noise)
  noise[-1] = 100
  np.testing.assert_array_equal(sampler()(X_T, jax.random.key(0), noise), expected)


# Types and errors.


def test_bfloat16_outputs_are_sampled_in_float32():
  x_0 = sample(
    lambda x, t: toy.network(x, t).astype(jnp.bfloat16),
    GaussianDiffusion.create(spacing="2"),
    X_T.astype(jnp.bfloat16),
    jax.random.key(0),
  )
  assert x_0.dtype == jnp.float32


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(method="plms"), "method = 'plms': accepted are ddpm, ddim, euler, heun"),
    (dict(method="ddim", eta=1.1), "eta = 1.1: must lie in [0, 1]"),
    (dict(method="ddim", eta=-0.1), "eta = -0.1: must lie in [0, 1]"),
  ],
)
def test_error_names_the_setting_its_value_and_accepted_values(settings, message):
  with pytest.raises(SettingError) as error:
    sample(toy.network, GaussianDiffusion.create(), X_T, jax.random.key(0), **settings)
  assert str(error.value).startswith(message)


# Repeated steps.


@pytest.mark.parametrize(("method", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_repeated_steps_keep_the_variance_of_normal_images(method, eta):
  """Noise of the wrong level would accumulate or vanish."""
  diffusion = GaussianDiffusion.create(
    prediction="x0", variance="fixed_large", spacing="250"
  )
  alphas = jnp.asarray(np.cumprod(1 - make_betas("linear", 1000)), jnp.float32)

  def posterior_mean(x, t):
    return jnp.sqrt(alphas)[t][:, None, None, None] * x

  x_T = jax.random.normal(jax.random.key(0), (4, 16, 16, 4))
  x_0 = sample(
    posterior_mean,
    diffusion,
    x_T,
    jax.random.key(1),
    method=method,
    eta=eta,
    repeats=4,
  )
  np.testing.assert_allclose(x_0.std(), 1, atol=0.06)


def test_each_step_is_repeated_the_given_number_of_times():
  seen = []

  def network(x, t):
    jax.debug.callback(lambda t: seen.append(int(t[0])), t)
    return toy.network(x, t)

  diffusion = GaussianDiffusion.create(spacing="3")
  sample(network, diffusion, X_T, jax.random.key(0), repeats=4)
  jax.effects_barrier()
  assert sorted(seen) == sorted(4 * diffusion.timesteps.tolist())


@pytest.mark.parametrize("method", ["dpm++", "heun"])
def test_solvers_refuse_repeats(method):
  with pytest.raises(SettingError, match="repeats = 2: must be at least 1"):
    sample(
      toy.network,
      GaussianDiffusion.create(),
      X_T,
      jax.random.key(0),
      method=method,
      repeats=2,
    )
