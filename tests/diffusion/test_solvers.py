"""Solvers, compared with the exact solution for normal data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.samplers import sample
from mdt_jax.diffusion.solvers import SOLVERS
from tests.diffusion import toy

MEAN, STD = 0.3, 0.5


def process(spacing, schedule="linear", num_timesteps=100_000):
  """A process with so many timesteps that rounding to a timestep has no effect."""
  return GaussianDiffusion.create(
    schedule, num_timesteps, spacing, prediction="x0", variance="fixed_small"
  )


def posterior_mean(alphas_cumprod):
  """E[x0 | x_t] for x0 ~ N(MEAN, STD^2). This is the optimal network."""
  table = jnp.asarray(alphas_cumprod, jnp.float32)

  def network(x, t):
    a = table[t][:, None, None, None]
    gain = jnp.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
    return MEAN + gain * (x - jnp.sqrt(a) * MEAN)

  return network


def solution(diffusion, x):
  """Exact solution of the ODE at the last noise level, then x0 predicted there."""
  a = diffusion.alphas_cumprod[[0, -1]]
  first, last = np.sqrt(a * STD**2 + 1 - a)
  x = np.sqrt(a[0]) * MEAN + (x - np.sqrt(a[1]) * MEAN) * first / last
  gain = np.sqrt(a[0]) * STD**2 / first**2
  return MEAN + gain * (x - np.sqrt(a[0]) * MEAN)


def error(method, spacing, schedule="linear"):
  """Root mean square error of a solver with exact scores."""
  diffusion = process(spacing, schedule)
  x_T = np.random.default_rng(0).standard_normal((64, 2, 2, 1)).astype(np.float32)
  network = posterior_mean(process("", schedule).alphas_cumprod)
  x_0 = sample(network, diffusion, x_T, jax.random.key(0), method=method)
  return np.sqrt(np.mean((np.asarray(x_0) - solution(diffusion, x_T)) ** 2))


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_error_falls_with_the_order_of_the_solver(method, order, spacing):
  coarse, fine = (error(method, f"{spacing}{count}") for count in (40, 160))
  assert order - 0.35 < np.log(coarse / fine) / np.log(4) < order + 0.6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("method", ["heun", "dpm++"])
def test_20_second_order_steps_beat_80_first_order_steps(method, schedule):
  spacing = "log_snr" if method == "dpm++" else "uniform"
  first_order = error("euler", f"{spacing}80", schedule)
  assert error(method, f"{spacing}20", schedule) < first_order


@pytest.mark.parametrize("spacing", ["uniform30", "log_snr20", "karras30"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_sde_samples_follow_the_data_distribution(schedule, spacing):
  network = posterior_mean(process("", schedule, 1000).alphas_cumprod)
  x_T = jax.random.normal(jax.random.key(0), (64, 16, 16, 1))
  x_0 = sample(
    network,
    process(spacing, schedule, 1000),
    x_T,
    jax.random.key(1),
    method="dpm++sde",
  )
  np.testing.assert_allclose(x_0.mean(), MEAN, atol=0.02)
  np.testing.assert_allclose(x_0.std(), STD, rtol=0.05)
  # Samples depend on the noise of the SDE, not on x_T.
  assert abs(np.corrcoef(x_0.ravel(), x_T.ravel())[0, 1]) < 0.1


# Nonlinear networks.

X_T = toy.recorded("loop/z")


def run(method, spacing, **settings):
  diffusion = GaussianDiffusion.create(spacing=spacing)
  return jax.jit(
    lambda: sample(
      toy.network, diffusion, X_T, jax.random.key(0), method=method, **settings
    )
  )()


@pytest.mark.parametrize("spacing", ["10", "karras10", "log_snr10"])
def test_euler_equals_ddim_with_eta_zero(spacing):
  np.testing.assert_allclose(
    run("euler", spacing), run("ddim", spacing), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize("method", ["dpm++", "heun", "euler"])
def test_solvers_converge_to_the_limit_of_ddim(method):
  limit = run("ddim", "1000")
  difference = jnp.abs(run(method, "500") - limit).max()
  coarse = jnp.abs(run("ddim", "25") - limit).max()
  assert difference < 0.02 * jnp.abs(limit).max()
  assert difference < 0.1 * coarse


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("spacing", ["1", "uniform1", "2", "log_snr7"])
def test_perfect_network_samples_its_image(method, spacing):
  image = toy.recorded("x0")[:2]
  diffusion = GaussianDiffusion.create(
    prediction="x0", variance="fixed_small", spacing=spacing
  )
  x_0 = sample(
    lambda x, t: jnp.asarray(image), diffusion, X_T, jax.random.key(0), method=method
  )
  np.testing.assert_allclose(x_0, image, atol=1e-5)


@pytest.mark.parametrize(("method", "calls"), [("dpm++", 10), ("heun", 19)])
def test_number_of_network_calls_is_as_documented(method, calls):
  seen = []

  def network(x, t):
    jax.debug.callback(lambda t: seen.append(int(t[0])), t)
    return toy.network(x, t)

  diffusion = GaussianDiffusion.create(spacing="10")
  sample(network, diffusion, X_T, jax.random.key(0), method=method)
  jax.effects_barrier()
  assert len(seen) == calls
  assert set(seen) == set(diffusion.timesteps.tolist())


@pytest.mark.parametrize("method", ["ddpm", "ddim", *SOLVERS])
def test_num_steps_runs_only_the_last_steps(method):
  image = toy.recorded("x0")[:2]
  diffusion = GaussianDiffusion.create(
    prediction="x0", variance="fixed_small", spacing="100"
  )
  seen = []

  def network(x, t):
    jax.debug.callback(lambda x, t: seen.append((int(t[0]), x)), x, t)
    return jnp.asarray(image)

  x = diffusion.q_sample(image, jnp.full((2,), 2), X_T)
  x_0 = sample(network, diffusion, x, jax.random.key(0), method=method, num_steps=3)
  jax.effects_barrier()
  seen.sort(key=lambda call: -call[0])
  np.testing.assert_array_equal(seen[0][1], x)
  assert {t for t, _ in seen} == set(diffusion.timesteps[:3].tolist())
  np.testing.assert_allclose(x_0, image, atol=1e-5)


@pytest.mark.parametrize("method", ["ddpm", "ddim", *SOLVERS])
def test_hold_is_applied_before_every_network_call(method):
  seen = []

  def network(x, t):
    jax.debug.callback(lambda x: seen.append(float(x[0, 0, 0, 0])), x)
    return toy.network(x, t)

  diffusion = GaussianDiffusion.create(spacing="5")
  sample(
    network,
    diffusion,
    X_T,
    jax.random.key(0),
    method=method,
    hold=lambda x, step: x.at[:, 0, 0, 0].set(step),
  )
  jax.effects_barrier()
  assert set(seen) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("method", SOLVERS)
def test_loop_is_one_scan_without_host_callbacks(method):
  """Noise and tables are computed on the device or before the loop."""
  diffusion = GaussianDiffusion.create(spacing="10")
  jaxpr = str(
    jax.make_jaxpr(
      lambda x, key: sample(toy.network, diffusion, x, key, method=method)
    )(X_T, jax.random.key(0))
  )
  assert jaxpr.count("= scan[") == 1
  assert "callback" not in jaxpr
