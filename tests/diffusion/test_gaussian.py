"""GaussianDiffusion: tables, predictions, losses, compared with the released code."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import (
  GaussianDiffusion,
  discretized_log_likelihood,
  normal_kl,
)
from mdt_jax.errors import SettingError
from tests import forked, reference
from tests.diffusion import toy

TABLES = {
  "betas": "betas",
  "alphas_cumprod": "alphas_cumprod",
  "posterior_variance": "posterior_variance",
  "posterior_log_variance": "posterior_log_variance_clipped",
  "posterior_mean_coef_x0": "posterior_mean_coef1",
  "posterior_mean_coef_xt": "posterior_mean_coef2",
}
PREDICTIONS = {"EPSILON": "epsilon", "START_X": "x0"}
LOSS_WEIGHTS = {"v1": "none", "v2": "min_snr"}

T = toy.RECORDED["t"]
X0, NOISE, X_T = toy.recorded("x0"), toy.recorded("noise"), toy.recorded("q_sample")


@functools.cache
def output():
  return jax.jit(toy.network)(X_T, jnp.asarray(T))


# Tolerance for one sample. The logarithm of a small probability amplifies rounding
# errors of the network's output.
BOUND_TOLERANCE = 4e-3


@functools.cache
def prediction(clip_denoised):
  """Moments of p(x_{t-1} | x_t) of the recorded network, under the recorded names."""
  p = GaussianDiffusion.create().p_mean_variance(output(), X_T, T, clip_denoised)
  return p._asdict() | {"pred_xstart": p.x0}


@functools.cache
def losses(version, name):
  diffusion = GaussianDiffusion.create(
    prediction=PREDICTIONS[name], loss_weight=LOSS_WEIGHTS[version]
  )
  return diffusion.training_losses(output(), X0, X_T, T, NOISE)


@pytest.mark.parametrize(("table", "name"), TABLES.items())
def test_tables_match_reference(table, name):
  actual = getattr(GaussianDiffusion.create(), table)
  reference.assert_matches(
    "tables of q and of its posterior, each value",
    actual,
    toy.RECORDED[f"linear/{name}"],
    1e-10,
    each=True,
  )


def test_q_sample_matches_reference():
  x_t = GaussianDiffusion.create().q_sample(X0, T, NOISE)
  reference.assert_matches("q_sample", x_t, X_T, reference.FORWARD_TOLERANCE)


@pytest.mark.parametrize("name", ["mean", "variance", "log_variance", "pred_xstart"])
def test_prediction_matches_reference(name):
  reference.assert_matches(
    "p_mean_variance",
    prediction(False)[name],
    toy.recorded(f"pmv/{name}"),
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("name", ["mean", "pred_xstart"])
def test_clipped_prediction_matches_reference(name):
  reference.assert_matches(
    "p_mean_variance, clipped",
    prediction(True)[name],
    toy.recorded(f"pmv_clip/{name}"),
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("term", ["mse", "vb", "loss"])
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("version", LOSS_WEIGHTS)
def test_losses_match_reference(version, name, term):
  reference.assert_matches(
    f"training losses of {version}, {PREDICTIONS[name]} prediction",
    losses(version, name)[term],
    toy.RECORDED[f"loss/{version}/{name}/{term}"],
    reference.FORWARD_TOLERANCE,
  )


# The bound of a sample spans nine orders of magnitude. At step 0, a small likelihood is
# the difference of two numbers close to 1. At the last step, the divergence is the
# difference of two numbers close to 0. The float32 error there is 1e-3, in the recorded
# values too.
@pytest.mark.parametrize("term", ["mse", "vb", "loss"])
@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("version", LOSS_WEIGHTS)
def test_losses_of_each_sample_match_reference(version, name, term):
  expected = toy.RECORDED[f"loss/{version}/{name}/{term}"]
  reference.assert_matches(
    "training losses, squared error of each sample"
    if term == "mse"
    else "training losses, variational bound of each sample",
    losses(version, name)[term],
    expected,
    2e-5 if term == "mse" else BOUND_TOLERANCE,
    each=True,
  )


def save_bound(path):
  bound, _ = GaussianDiffusion.create().variational_bound(
    output(), X0, X_T, T, clip_denoised=True
  )
  np.save(path, bound)


def test_variational_bound_matches_reference(tmp_path):
  path = tmp_path / "bound.npy"
  # The decoder's likelihood subtracts nearly equal values of tanh. With the flags of
  # tests/conftest.py, the rounding of tanh is amplified to 3e-4.
  process = forked.Forked(save_bound, path, environment={"XLA_FLAGS": ""})
  assert process.end() == 0, process.err
  bound, expected = np.load(path), toy.RECORDED["vb_bpd"]
  reference.assert_matches(
    "variational bound", bound, expected, reference.FORWARD_TOLERANCE
  )
  reference.assert_matches(
    "variational bound, of each sample", bound, expected, BOUND_TOLERANCE, each=True
  )


# Parametrizations.


def parametrised(kind, diffusion):
  """(output of a perfect network, x_t) for x0 and noise of the fixture."""
  alpha = np.sqrt(diffusion.alphas_cumprod[T]).reshape(-1, 1, 1, 1)
  sigma = np.sqrt(1 - diffusion.alphas_cumprod[T]).reshape(-1, 1, 1, 1)
  x_t = alpha * X0 + sigma * NOISE
  target = {"epsilon": NOISE, "x0": X0, "v": alpha * NOISE - sigma * X0}[kind]
  return target.astype(np.float32), x_t.astype(np.float32)


@functools.cache
def perfect(kind):
  """(diffusion with a fixed variance, perfect output, x_t)."""
  diffusion = GaussianDiffusion.create(prediction=kind, variance="fixed_small")
  return diffusion, *parametrised(kind, diffusion)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_perfect_output_gives_x0(kind):
  diffusion, out, x_t = perfect(kind)
  x0 = diffusion.predict_x0(out, x_t, T)
  # The noise is divided by alpha, which is 1/157 at the last step.
  tolerance = 2e-4 if kind == "epsilon" else 1e-6
  np.testing.assert_allclose(x0, X0, atol=tolerance * np.abs(X0).max())


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_perfect_output_gives_the_noise(kind):
  diffusion, out, x_t = perfect(kind)
  noise = diffusion.noise_from_x0(diffusion.predict_x0(out, x_t, T), x_t, T)
  # The error of x0 is divided by sigma, which is 1/100 at the first step.
  np.testing.assert_allclose(noise, NOISE, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_perfect_output_has_zero_mse(kind):
  diffusion, out, x_t = perfect(kind)
  losses = diffusion.training_losses(out, X0, x_t, T, NOISE)
  np.testing.assert_allclose(losses["mse"], 0, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_perfect_output_gives_the_posterior_mean(kind):
  diffusion, out, x_t = perfect(kind)
  mean = diffusion.p_mean_variance(out, x_t, T).mean
  expected = diffusion.q_posterior_mean(X0, x_t, T)
  np.testing.assert_allclose(mean, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("weight", "gamma"), [("none", 5.0), ("min_snr", 5.0)])
def test_min_snr_weights_match_their_definition(kind, weight, gamma):
  diffusion = GaussianDiffusion.create(
    prediction=kind, variance="fixed_small", loss_weight=weight, min_snr_gamma=gamma
  )
  out, x_t = parametrised(kind, diffusion)
  mse = diffusion.training_losses(out + 1, X0, x_t, T, NOISE)["mse"]
  alphas = diffusion.alphas_cumprod[T]
  snr = alphas / (1 - alphas)
  weights = np.minimum(snr, gamma) / (1 if kind == "x0" else snr)
  expected = np.ones(len(T)) if weight == "none" else weights
  np.testing.assert_allclose(mse, expected, rtol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 20.0])
def test_gamma_caps_the_signal_to_noise_ratio(gamma):
  diffusion = GaussianDiffusion.create(loss_weight="min_snr", min_snr_gamma=gamma)
  np.testing.assert_allclose(
    (diffusion.mse_weights * diffusion.snr).max(), gamma, rtol=1e-12
  )


# Variances.


@pytest.mark.parametrize("step", [0, 1, 500, 999])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances_match_ddpm(variance, step):
  diffusion = GaussianDiffusion.create(variance=variance)
  t = np.array([step])
  p = diffusion.p_mean_variance(NOISE[:1], X_T[:1], t)
  betas = toy.RECORDED["linear/betas"]
  posterior = toy.RECORDED["linear/posterior_variance"]
  # The posterior variance of step 0 is 0, so both use that of step 1.
  table = posterior if variance == "fixed_small" or step == 0 else betas
  np.testing.assert_allclose(p.variance, table[max(step, 1 - (step > 0))], rtol=1e-5)


@pytest.mark.parametrize(("fraction", "log_table"), [(-1, "posterior"), (1, "beta")])
def test_learned_variance_interpolates_from_posterior_to_beta(fraction, log_table):
  diffusion = GaussianDiffusion.create()
  out = jnp.concatenate([NOISE, jnp.full_like(NOISE, fraction)], axis=-1)
  log_variance = diffusion.p_mean_variance(out, X_T, T).log_variance
  logs = {
    "posterior": toy.RECORDED["linear/posterior_log_variance_clipped"],
    "beta": np.log(toy.RECORDED["linear/betas"]),
  }[log_table]
  expected = np.broadcast_to(logs[T].reshape(-1, 1, 1, 1), NOISE.shape)
  np.testing.assert_allclose(log_variance, expected, rtol=1e-6)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variance_has_no_vb_loss(variance):
  diffusion = GaussianDiffusion.create(variance=variance)
  losses = diffusion.training_losses(NOISE + 1, X0, X_T, T, NOISE)
  assert set(losses) == {"mse", "loss"}
  np.testing.assert_array_equal(losses["loss"], losses["mse"])


@functools.cache
def gradient_of_bound():
  diffusion = GaussianDiffusion.create()

  def bound(out):
    return diffusion.training_losses(out, X0, X_T, T, NOISE)["vb"].sum()

  return jax.grad(bound)(output())


def test_vb_loss_has_no_gradient_in_the_mean():
  np.testing.assert_array_equal(gradient_of_bound()[..., :4], 0)


def test_vb_loss_has_a_gradient_in_every_variance():
  assert (jnp.abs(gradient_of_bound()[..., 4:]).max(axis=(1, 2, 3)) > 0).all()


def test_mse_has_no_gradient_in_the_variance():
  diffusion = GaussianDiffusion.create()

  def mse(out):
    return diffusion.training_losses(out, X0, X_T, T, NOISE)["mse"].sum()

  np.testing.assert_array_equal(jax.grad(mse)(output())[..., 4:], 0)


# Terms of the variational bound.


def test_normal_kl_matches_its_formula():
  rng = np.random.default_rng(0)
  m1, m2, v1, v2 = rng.standard_normal((4, 100))
  expected = (v2 - v1) / 2 + (np.exp(v1) + (m1 - m2) ** 2) / (2 * np.exp(v2)) - 0.5
  np.testing.assert_allclose(normal_kl(m1, v1, m2, v2), expected, rtol=1e-4, atol=1e-5)


def test_true_posterior_has_zero_divergence():
  diffusion = GaussianDiffusion.create(prediction="x0")
  later = np.maximum(T, 1)
  out = jnp.concatenate([X0, jnp.full_like(X0, -1)], axis=-1)
  x_t = diffusion.q_sample(X0, later, NOISE)
  bound, _ = diffusion.variational_bound(out, X0, x_t, later)
  np.testing.assert_allclose(bound, 0, atol=1e-6)


@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.999])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0])
def test_likelihoods_of_the_256_levels_sum_to_one(mean, log_scale):
  levels = np.linspace(-1, 1, 256, dtype=np.float32)
  logs = discretized_log_likelihood(levels, jnp.float32(mean), jnp.float32(log_scale))
  np.testing.assert_allclose(jnp.exp(logs).sum(), 1, atol=1e-5)


# Respacing.


@pytest.mark.parametrize("spacing", ["250", "10", "ddim25", "100,50,25", "1"])
def test_respaced_process_keeps_the_original_noise_levels(spacing):
  spaced = GaussianDiffusion.create(spacing=spacing)
  expected = toy.RECORDED["linear/alphas_cumprod"][spaced.timesteps]
  np.testing.assert_allclose(spaced.alphas_cumprod, expected, rtol=1e-10)


def test_network_receives_the_original_timesteps():
  spaced = GaussianDiffusion.create(spacing="10")
  timesteps = spaced.network_time(jnp.arange(10))
  assert timesteps.dtype == jnp.int32
  np.testing.assert_array_equal(timesteps, toy.RECORDED["spacing/10"])


# Errors.


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(prediction="eps"), "prediction = 'eps': accepted are epsilon, x0, v"),
    (
      dict(variance="learned"),
      "variance = 'learned': accepted are learned_range, fixed_small, fixed_large",
    ),
    (dict(loss_weight="snr"), "loss_weight = 'snr': accepted are none, min_snr"),
    (dict(min_snr_gamma=0.0), "min_snr_gamma = 0.0: must be above 0"),
    (dict(schedule="exp"), "schedule = 'exp': accepted are linear, cosine"),
  ],
)
def test_error_names_the_setting_its_value_and_accepted_values(settings, message):
  with pytest.raises(SettingError) as error:
    GaussianDiffusion.create(**settings)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("variance", "channels"), [("learned_range", 4), ("fixed_small", 8)]
)
@pytest.mark.parametrize("method", ["p_mean_variance", "training_losses"])
def test_output_channels_must_match_the_variance(method, variance, channels):
  diffusion = GaussianDiffusion.create(variance=variance)
  out = jnp.zeros((6, 8, 8, channels))
  arguments = {"p_mean_variance": (X_T, T), "training_losses": (X0, X_T, T, NOISE)}
  with pytest.raises(ValueError, match=f"variance = '{variance}'"):
    getattr(diffusion, method)(out, *arguments[method])
