"""The process "flow" and the samplers in time, as SiT's released code computes them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import create_process
from mdt_jax.diffusion.flow import PATHS, mode_times
from mdt_jax.diffusion.likelihood import calc_flow_bpd
from mdt_jax.diffusion.runge_kutta import RUNGE_KUTTA
from mdt_jax.diffusion.samplers import sample
from mdt_jax.diffusion.time_solvers import make_arguments, make_grid
from tests import reference

RECORDED = reference.load("sit_transport")
PATH_NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
PREDICTION_NAMES = {"velocity": "velocity", "epsilon": "noise", "score": "score"}
TOLERANCE = 2e-5  # of losses, as of forward passes
# Rows of docs/parity.md.
PATH_ROW = "SiT, coefficients of the paths"
CONVERSION_ROW = "SiT, conversions of predictions"
ODE_ROW, SDE_ROW = "SiT, samplers ode_*", "SiT, samplers sde and sde_heun"
LIKELIHOOD_ROW = "SiT, likelihood"
STEPS = int(RECORDED["loop/num_steps"]) - 1  # the release counts times


def recorded(name):
  """A recorded array of images, channels last."""
  return reference.to_nhwc(RECORDED[name])


def network(x, t):
  """tanh(conv3x3(x) + bias cos(3 t)), the network of the recorded loops."""
  features = jax.lax.conv_general_dilated(
    x,
    RECORDED["toy/conv_oihw"].transpose(2, 3, 1, 0),
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  phase = jnp.cos(3 * t)[:, None, None, None]
  return jnp.tanh(features + RECORDED["toy/tbias"] * phase)


def run(process, method, steps=STEPS, noise=None, **arguments):
  """Samples from the recorded noise, in evenly spaced times."""
  checked = make_arguments(method, arguments)
  grid = make_grid(process, method, steps, None, checked)
  options = {"method": method, "arguments": checked, "noise": noise}
  loop = jax.jit(lambda x: sample(network, grid, x, jax.random.key(0), **options))
  return loop(recorded("loop/z"))


@functools.cache
def flow(path, prediction="velocity", **settings):
  return create_process("flow", path=path, prediction=prediction, **settings)


# SiT's time is 1 for data.
@pytest.mark.parametrize("path", PATHS)
def test_coefficients_match_reference(path):
  t = 1 - RECORDED["coef/t"].astype(np.float64)
  expected = {
    name: RECORDED[f"coef/{PATH_NAMES[path]}/{name}"]
    for name in ("alpha", "sigma", "d_alpha", "d_sigma", "drift_var")
  }
  process = flow(path)
  found = {
    "alpha": process.alpha(t),
    "sigma": process.sigma(t),
    "d_alpha": -process.alpha_rate(t),
    "d_sigma": -process.sigma_rate(t),
    "drift_var": process.diffusion_rate(t),
  }
  for name, values in found.items():
    reference.assert_matches(PATH_ROW, values, expected[name], 1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_conversions_match_reference(path):
  t = 1 - jnp.asarray(RECORDED["coef/t"])
  x, v = recorded("coef/x"), recorded("coef/v")
  name, process = PATH_NAMES[path], flow(path)
  found = {"noise": process.to_noise(v, x, t), "score": process.to_score(v, x, t)}
  for kind, values in found.items():
    expected = recorded(f"coef/{name}/{kind}_from_velocity")
    reference.assert_matches(CONVERSION_ROW, values, expected, 1e-4)
  score = flow(path, "score").to_velocity(v, x, t)
  expected = -recorded(f"coef/{name}/velocity_from_score")
  reference.assert_matches(CONVERSION_ROW, score, expected, 1e-4)


@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_losses_match_reference(path, prediction):
  start = f"train/{PATH_NAMES[path]}/{PREDICTION_NAMES[prediction]}"
  x0, noise = recorded("train/x1"), recorded("train/x0")
  # In float64: 1 - t = 0.001 would be wrong by 1.3e-5, and its loss by 2.6e-5.
  t = 1 - RECORDED[f"{start}/t"].astype(np.float64)
  for weight in ("none", "velocity", "likelihood"):
    if f"{start}/loss_{weight}" not in RECORDED:
      continue
    process = flow(path, prediction, loss_weight=weight)
    x_t = process.q_sample(x0, t, noise)
    losses = process.training_losses(
      network(x_t, process.network_time(t)), x0, x_t, t, noise
    )
    expected = RECORDED[f"{start}/loss_{weight}"]
    reference.assert_matches("SiT, losses", losses["loss"], expected, TOLERANCE)


@pytest.mark.parametrize("prediction", PREDICTION_NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_times_span_the_released_intervals(path, prediction):
  process = flow(path, prediction)
  start = f"interval/{PATH_NAMES[path]}/{PREDICTION_NAMES[prediction]}"
  low, high = process.training_interval
  np.testing.assert_allclose(RECORDED[f"{start}/train"], [1 - high, 1 - low], atol=1e-9)
  low, high = process.sampling_interval
  np.testing.assert_allclose(RECORDED[f"{start}/ode"], [1 - high, 1 - low], atol=1e-9)
  t = process.sample_t(jax.random.key(0), 1000)
  low, high = process.training_interval
  assert float(t.min()) >= low and float(t.max()) <= high


SOLVERS = {"heun2": "ode_heun"} | {
  method.removeprefix("ode_"): method for method in RUNGE_KUTTA if method != "ode_heun"
}
ODES = [
  name.removeprefix("ode/")
  for name in RECORDED
  if name.startswith("ode/") and name.split("/")[-1] in SOLVERS
]
SDES = [
  name.removeprefix("sde/")
  for name in RECORDED
  if name.startswith("sde/") and name.split("/")[-1][0] in "MENT"  # not is_nan, t, all
]


@pytest.mark.parametrize("name", ODES)
def test_ode_matches_reference(name):
  path, prediction, _ = parsed(f"{name.rpartition('/')[0]}/sigma/Mean")
  found = run(flow(path, prediction), SOLVERS[name.split("/")[-1]])
  reference.assert_matches(ODE_ROW, found, recorded(f"ode/{name}"), 1e-4)


def parsed(name):
  """(path, prediction, arguments) of the name of a recorded SDE."""
  path, prediction, form, last = name.split("/")
  form, _, norm = form.partition("_norm")
  last, _, size = last.partition("_size")
  arguments = {
    "diffusion": form.removesuffix("_eps1e-3").replace("-", "_").lower(),
    "norm": float(norm.replace("p", ".") or 1),
    "last_step": last.lower(),
    "last_step_size": float(size.replace("p", ".") or 0.04),
  }
  paths, predictions = (
    {theirs: ours for ours, theirs in names.items()}
    for names in (PATH_NAMES, PREDICTION_NAMES)
  )
  return paths[path], predictions[prediction], arguments


@pytest.mark.parametrize("name", SDES)
def test_sde_matches_reference(name):
  path, prediction, arguments = parsed(name)
  steps = STEPS + (arguments["last_step"] != "none")
  noise = recorded("loop/noise")
  found = run(flow(path, prediction), "sde", steps, noise, **arguments)
  reference.assert_matches(SDE_ROW, found, recorded(f"sde/{name}"), 1e-4)


@pytest.mark.parametrize("name", ["Linear/velocity/sigma/Mean", "GVP/noise/sigma/None"])
def test_sde_heun_matches_reference(name):
  path, prediction, arguments = parsed(name)
  steps = STEPS + (arguments["last_step"] != "none")
  noise = recorded("loop/noise")
  found = run(flow(path, prediction), "sde_heun", steps, noise, **arguments)
  reference.assert_matches(SDE_ROW, found, recorded(f"sde_heun/{name}"), 1e-4)


def test_likelihood_matches_reference():
  process, x = flow("linear"), recorded("likelihood/x")
  found = jax.jit(
    lambda x: calc_flow_bpd(
      network,
      process,
      x,
      jax.random.key(0),
      num_steps=STEPS,
      method="ode_euler",
      signs=recorded("likelihood/rademacher"),
    )
  )(x)
  log_p = -found["total_bpd"] * np.log(2) * x[0].size
  start = "likelihood/Linear/velocity/euler"
  reference.assert_matches(LIKELIHOOD_ROW, log_p, RECORDED[f"{start}/logp"], 1e-4)
  reference.assert_matches(LIKELIHOOD_ROW, found["noise"], recorded(f"{start}/z"), 1e-4)


def drawn(count=20_000, **settings):
  return np.asarray(flow("linear", **settings).sample_t(jax.random.key(0), count))


@pytest.mark.parametrize("data_time", [0, 1])
def test_logit_normal_times_of_the_network(data_time):
  """Their logits are normal, as in SD3 and JiT, whatever the direction of time."""
  settings = {"time_distribution": "logit_normal", "time_mean": -0.8, "time_std": 0.6}
  t = drawn(data_time=data_time, **settings)
  network_time = np.asarray(flow("linear", data_time=data_time).network_time(t))
  logits = np.log(network_time / (1 - network_time))
  assert abs(logits.mean() + 0.8) < 0.02 and abs(logits.std() - 0.6) < 0.02


def test_mode_times_match_reference():
  times = mode_times(jnp.asarray(RECORDED["time/u"]))
  np.testing.assert_allclose(times, RECORDED["time/sd3/mode_1p29"], atol=1e-6)
  t = drawn(time_distribution="mode")
  assert abs(t.mean() - 0.5) < 0.01
  assert t.std() < drawn().std() - 0.01  # more times in the middle


@pytest.mark.parametrize(
  ("name", "shift", "is_of_data"),
  [("sd3/grid_shift3", 3.0, False), ("lightningdit/grid_shift0p3", 1 / 0.3, True)],
)
def test_shifted_times_match_reference(name, shift, is_of_data):
  """SD3 counts times from data to noise, LightningDiT from noise to data."""
  grid, expected = RECORDED["time/grid"], RECORDED[f"time/{name}"]
  if is_of_data:
    grid, expected = 1 - grid, 1 - expected
  process = flow("linear", sampling_shift=shift)
  np.testing.assert_allclose(process.shifted(grid), expected, atol=1e-6)
  assert drawn(time_shift=shift).mean() > drawn().mean() + 0.1
