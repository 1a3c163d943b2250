"""Processes in continuous time: their interface, and every sampler on every process."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import create_process
from mdt_jax.diffusion.continuous import TimeGrid
from mdt_jax.diffusion.flow import LOSS_WEIGHTS, PREDICTIONS
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.likelihood import calc_flow_bpd
from mdt_jax.diffusion.process import like
from mdt_jax.diffusion.samplers import METHODS, Sampler, sample
from mdt_jax.diffusion.solvers import SOLVERS
from mdt_jax.errors import SettingError
from tests.diffusion import test_flow as sit

# Name -> (process, settings). The network of "gaussian" predicts v.
PROCESSES = {
  "linear": ("flow", {}),
  "gvp": ("flow", {"path": "gvp"}),
  "vp": ("flow", {"path": "vp"}),
  "edm": ("edm", {}),
  "gaussian": ("gaussian", {"prediction": "v", "variance": "fixed_small"}),
}
CONTINUOUS = [name for name in PROCESSES if name != "gaussian"]
MEAN, STD = 0.3, 0.5  # of the data in the tests of convergence


@functools.cache
def create(name):
  process, settings = PROCESSES[name]
  return create_process(process, **settings)


def own_time(name, network_time):
  """The time of a process from the time that its network receives."""
  return {"edm": 4 * network_time, "gaussian": network_time}.get(name, 1 - network_time)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_rates_are_derivatives(name):
  process, h = create(name), 1e-6
  t = np.linspace(*process.sampling_interval, 9)[1:-1]
  for value, rate in (
    (process.alpha, process.alpha_rate),
    (process.sigma, process.sigma_rate),
  ):
    numeric = (value(t + h) - value(t - h)) / (2 * h)
    np.testing.assert_allclose(rate(t), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_times_at_log_snr(name):
  process = create(name)
  t = np.linspace(*process.sampling_interval, 9)[1:-1]
  np.testing.assert_allclose(process.time_at(process.log_snr(t)), t, rtol=1e-9)


FLOWS = [
  ("flow", {"path": path, "prediction": prediction, "data_time": data_time})
  for path in ("linear", "gvp", "vp")
  for prediction in PREDICTIONS
  for data_time in (0, 1)
]


@pytest.mark.parametrize(("name", "settings"), [*FLOWS, ("edm", {})])
def test_target_predicts_data_noise_velocity_and_score(name, settings):
  process = create_process(name, **settings)
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 4, 2, 2, 3)).astype(np.float32)
  low, high = process.sampling_interval
  t = jnp.asarray(low + np.array([0.2, 0.4, 0.6, 0.8]) * (high - low), jnp.float32)
  x_t = process.q_sample(x0, t, noise)
  output = process.target(x0, noise, t)
  velocity = like(process.alpha_rate(t), x0) * x0
  velocity += like(process.sigma_rate(t), x0) * noise
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-3)
  close(process.to_x0(output, x_t, t), x0)
  close(process.to_noise(output, x_t, t), noise)
  close(process.to_velocity(output, x_t, t), velocity)
  close(process.to_score(output, x_t, t), -noise / like(process.sigma(t), noise))
  assert float(process.training_losses(output, x0, x_t, t, noise)["loss"].max()) == 0


def exact_network(name):
  """The best prediction for normal data N(MEAN, STD^2)."""
  process = create(name)

  def network(x, network_time):
    t = own_time(name, network_time)
    alpha, sigma = like(process.alpha(t), x), like(process.sigma(t), x)
    surprise = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x0, noise = MEAN + STD**2 * alpha * surprise, sigma * surprise
    return process.target(x0, noise, t)

  return network


def drawn_by(name, sampler, x_T):
  """Samples of the exact network."""
  network, options = exact_network(name), {"method": sampler.method}
  options["arguments"] = sampler.arguments
  key = jax.random.key(0)
  return jax.jit(lambda x: sample(network, sampler.process, x, key, **options))(x_T)


def error(name, method, num_steps, **arguments):
  """Largest distance from the exact end of the probability flow."""
  process = create(name)
  options = {"method": method, "num_steps": num_steps, "arguments": arguments}
  sampler = Sampler.create(process, Guidance(), **options)
  levels = sampler.process.levels()
  alpha, sigma = levels.alpha[-1], levels.sigma[-1]
  x_T = sigma * np.random.default_rng(0).standard_normal((4, 2, 2, 1))
  # A flow moves each quantile of the data at the start to the same one at the end.
  quantile = (x_T - alpha * MEAN) / math.hypot(alpha * STD, sigma)
  drawn = drawn_by(name, sampler, jnp.asarray(x_T, jnp.float32))
  return float(np.abs(drawn - (MEAN + STD * quantile)).max())


ORDERS = {
  "euler": 1,
  "heun": 2,
  "dpm++": 2,
  "ode_euler": 1,
  "ode_midpoint": 2,
  "ode_heun": 2,
  "ode_heun3": 3,
  "ode_rk4": 4,
  "edm": 2,
}
FLOOR = 3e-4  # ends of the paths at t > 0 and rounding


@pytest.mark.parametrize(
  ("name", "method"),
  [
    (name, method)
    for name in PROCESSES
    for method in ORDERS
    if name != "gaussian" or method in SOLVERS  # the others need continuous time
  ],
)
def test_deterministic_samplers_converge_with_their_order(name, method):
  coarse, fine = error(name, method, 12), error(name, method, 48)
  assert fine < 0.1
  assert fine < max(coarse / 4 ** (ORDERS[method] - 0.35), FLOOR)


@pytest.mark.parametrize("method", ["dpm++sde", "sde", "sde_heun", "edm"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_random_samplers_draw_the_data(name, method):
  process = create(name)
  arguments = {"churn": 40.0, "churn_noise": 1.0} if method == "edm" else {}
  options = {"method": method, "num_steps": 100, "arguments": arguments}
  sampler = Sampler.create(process, Guidance(), **options)
  x_T = process.noise_scale * jax.random.normal(jax.random.key(1), (4096, 2, 2, 1))
  drawn = drawn_by(name, sampler, x_T)
  # Standard errors: 0.004 of the mean, 0.003 of the standard deviation.
  assert abs(float(drawn.mean()) - MEAN) < 0.03
  assert abs(float(drawn.std()) - STD) < 0.03


@pytest.mark.parametrize("method", ["euler", "heun", "dpm++"])
def test_processes_draw_the_same_with_a_network_in_other_words(method):
  """One function of (x / alpha, log-SNR) predicts x0, in the terms of each process."""
  gaussian = create_process("gaussian", variance="fixed_small")
  grid = gaussian.respaced("log_snr", 10)
  levels = grid.levels()
  start = sit.recorded("loop/z")

  def x0_of(scaled, log_snr):
    return sit.network(scaled / jnp.sqrt(1 + jnp.exp(-2 * log_snr))[0], log_snr / 5)

  def draw(process, time_of):
    def network(x, network_time):
      t = time_of(network_time)
      alpha, sigma = process.alpha(t), process.sigma(t)
      x0 = x0_of(x / like(alpha, x), jnp.log(alpha / sigma))
      noise = (x - like(alpha, x) * x0) / like(sigma, x)
      return process.target(x0, noise, t)

    steps = process.levels() if process is grid else None
    own = process if steps else TimeGrid(process, process.time_at(levels.log_snr))
    scale = own.levels().alpha[-1] / levels.alpha[-1]
    key = jax.random.key(0)
    return jax.jit(lambda x: sample(network, own, x, key, method=method))(scale * start)

  timesteps = jnp.asarray(grid.timesteps)
  expected = draw(grid, lambda time: jnp.searchsorted(timesteps, time))
  for path in ("linear", "gvp", "vp"):
    for prediction in PREDICTIONS:
      flow = create_process("flow", path=path, prediction=prediction)
      found = draw(flow, lambda time: 1 - time)
      np.testing.assert_allclose(found, expected, atol=1e-4)
  edm = create_process("edm")
  np.testing.assert_allclose(draw(edm, lambda t: 4 * t), expected, atol=1e-4)


def test_every_method_is_tested():
  random = {"ddpm", "ddim", "dpm++sde", "sde", "sde_heun"}
  assert set(METHODS) == random | set(ORDERS)


@pytest.mark.parametrize("spacing", ["uniform", "log_snr", "karras"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_grid_increases_within_the_process(name, spacing):
  process = create(name)
  times = process.respaced(spacing, 7).times
  low, high = process.sampling_interval
  assert len(times) == 7 and (np.diff(times) > 0).all()
  assert low <= times[0] and times[-1] <= high + 1e-12
  assert process.respaced(spacing, 1).times.shape == (1,)


def test_edit_starts_at_its_share_of_the_process():
  grid = create("linear").respaced("uniform", 10)
  assert grid.num_edit_steps(0.5) == 5
  assert grid.num_edit_steps(1.0) == 10
  assert grid.num_edit_steps(0.01) == 2


def test_guidance_knows_the_end_of_the_process():
  """SiT's network receives 0 at full noise; the scale grows from 1 there."""
  process = create("linear")
  guidance = Guidance(
    scale=3.0,
    power=1.0,
    channels=None,
    interval=(0.2, 1.0),
    num_timesteps=process.end_network_time,
    clean_time=process.clean_network_time,
  )
  network = guidance.apply(lambda x, t, y: x + like(y, x), jnp.ones(1), jnp.zeros(1))
  x = jnp.zeros((1, 1, 1, 1))
  # At the output 1 the scale was 1: full noise, and outside the interval.
  outputs = [float(network(x, jnp.array([t])).squeeze()) for t in (0.0, 0.5, 0.9)]
  np.testing.assert_allclose(outputs, [1.0, 2.0, 1.0], atol=1e-5)


def test_churn_above_full_noise_is_guided():
  """Churn raises the first level of noise above that of the end of the process."""
  guidance = Guidance(scale=3.0, power=0.5, channels=None, interval=(0.2, 1.0))
  network = guidance.apply(lambda x, t, y: x + like(y, x), jnp.ones(1), jnp.zeros(1))
  x = jnp.zeros((1, 1, 1, 1))
  above = float(network(x, jnp.array([1001.0])).squeeze())
  assert above == float(network(x, jnp.array([1000.0])).squeeze()) == 1.0
  constant = dataclasses.replace(guidance, power=0.0)
  network = constant.apply(lambda x, t, y: x + like(y, x), jnp.ones(1), jnp.zeros(1))
  assert float(network(x, jnp.array([1001.0])).squeeze()) == 3.0


@pytest.mark.parametrize(
  "settings",
  [settings for _, settings in FLOWS if settings["prediction"] != "velocity"],
)
@pytest.mark.parametrize("weight", LOSS_WEIGHTS)
def test_weights_are_finite_at_all_times_of_training(settings, weight):
  process = create_process("flow", **settings, loss_weight=weight)
  weights = process.weight(jnp.asarray(process.training_interval))
  assert np.isfinite(weights).all() and (np.asarray(weights) > 0).all()


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_end_of_a_path_has_no_data(path):
  process = create(path)
  for end in (np.array(1.0), jnp.float32(1.0)):
    assert process.alpha(end) == 0 and process.sigma(end) == 1


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize(
  ("method", "spacing", "arguments"),
  [("heun", "uniform", {}), ("sde", None, {"diffusion": "sbdm"})],
)
def test_samplers_start_where_a_path_has_no_data(path, method, spacing, arguments):
  options = {"method": method, "num_steps": 30, "spacing": spacing}
  sampler = Sampler.create(create(path), Guidance(), **options, arguments=arguments)
  x_T = jax.random.normal(jax.random.key(1), (1024, 2, 2, 1))
  drawn = drawn_by(path, sampler, x_T)
  assert abs(float(drawn.mean()) - MEAN) < 0.05
  assert abs(float(drawn.std()) - STD) < 0.05


REFUSED = [
  ("flow", {"path": "cubic"}, "path", "linear, gvp, vp"),
  ("flow", {"prediction": "v"}, "prediction", "velocity, epsilon, score, x0"),
  ("flow", {"loss_weight": "min_snr"}, "loss_weight", "none, velocity, likelihood"),
  ("flow", {"loss_weight": "likelihood"}, "loss_weight", "velocity prediction"),
  ("flow", {"time_shift": 0.0}, "time_shift", "above 0"),
  ("flow", {"time_shift": 1e300}, "time_shift", "must lie in"),
  ("flow", {"time_shift": 10**400}, "time_shift", "must lie in"),
  ("flow", {"time_mean": float("nan")}, "time_mean", "must be a number"),
  ("flow", {"sigma_floor": 0.0}, "sigma_floor", "must lie in (0"),
  ("flow", {"data_time": 2}, "data_time", "0, 1"),
  ("edm", {"sigma_max": 0.001}, "sigma_max", "above sigma_min"),
  ("edm", {"p_std": 0.0}, "p_std", "above 0"),
  ("edm", {"path": "linear"}, "path", "sigma_data"),
]


@pytest.mark.parametrize(("name", "settings", "setting", "accepted"), REFUSED)
def test_bad_settings_are_refused(name, settings, setting, accepted):
  with pytest.raises(SettingError) as error:
    create_process(name, **settings)
  assert error.value.setting == setting
  assert all(word in error.value.accepted for word in accepted.split(", "))


REFUSED_SAMPLERS = [
  ("gaussian", "sde", {}, {}, "method", "continuous time"),
  ("linear", "ddpm", {}, {}, "method", "gaussian"),
  (
    "linear",
    "sde",
    {"diffusion": "cubic"},
    {},
    "arguments.diffusion",
    "constant, sbdm",
  ),
  ("linear", "sde", {"churn": 1.0}, {}, "arguments.churn", "last_step"),
  ("linear", "heun", {"churn": 1.0}, {}, "arguments", "must be empty"),
  ("linear", "sde", {}, {"num_steps": 1}, "num_steps", "at least 2"),
  ("linear", "sde", {}, {"clip_denoised": True}, "clip_denoised", "must be False"),
  ("linear", "edm", {}, {"spacing": "uniform"}, "spacing", "karras"),
  ("edm", "sde", {"last_step": "mean"}, {}, "arguments.last_step", "tweedie"),
  (
    "linear",
    "sde",
    {"diffusion": "sbdm", "last_step_size": 0.9995},
    {},
    "arguments.last_step_size",
    "below 0.999",
  ),
  ("gvp", "edm", {}, {"spacing": "uniform"}, "spacing", "karras"),
]


@pytest.mark.parametrize(
  ("name", "method", "arguments", "options", "setting", "accepted"), REFUSED_SAMPLERS
)
def test_bad_samplers_are_refused(name, method, arguments, options, setting, accepted):
  options = {"method": method, "num_steps": 4, "arguments": arguments, **options}
  with pytest.raises(SettingError) as error:
    Sampler.create(create(name), Guidance(), **options)
  assert error.value.setting == setting
  assert all(word in error.value.accepted for word in accepted.split(", "))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_likelihood_of_normal_data(name):
  """The density of N(MEAN, STD^2), which the exact network flows to noise."""
  x0 = MEAN + STD * jax.random.normal(jax.random.key(2), (4, 4, 4, 1))
  found = jax.jit(
    lambda x: calc_flow_bpd(exact_network(name), create(name), x, jax.random.key(0))
  )(x0)
  density = np.exp(-(((np.asarray(x0) - MEAN) / STD) ** 2) / 2) / math.sqrt(2 * np.pi)
  expected = -np.log2(density / STD).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(found["total_bpd"], expected, atol=0.01)
