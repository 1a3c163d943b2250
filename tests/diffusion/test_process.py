"""The interface of a process, tested on GaussianDiffusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import PROCESSES, GaussianDiffusion, Process, create_process
from mdt_jax.errors import SettingError

T = jnp.array([0, 250, 700])
RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_target_recovers_data_noise_and_velocity(prediction, variance):
  process = create_process("gaussian", prediction=prediction, variance=variance)
  x_t = process.q_sample(X0, T, NOISE)
  output = process.target(X0, NOISE, T)
  if process.learns_variance:
    output = jnp.concatenate([output, jnp.ones_like(output)], axis=-1)
  alpha, sigma = (f(T)[:, None, None, None] for f in (process.alpha, process.sigma))
  velocity = alpha * NOISE - sigma * X0
  # At t = 0, the noise is a difference of nearly equal numbers.
  np.testing.assert_allclose(process.to_x0(output, x_t, T), X0, atol=1e-5)
  np.testing.assert_allclose(process.to_noise(output, x_t, T), NOISE, atol=1e-3)
  np.testing.assert_allclose(process.to_velocity(output, x_t, T), velocity, atol=1e-3)


def test_q_sample_mixes_data_and_noise_by_alpha_and_sigma():
  process = create_process("gaussian", schedule="cosine")
  np.testing.assert_allclose(
    process.alpha(T) ** 2 + process.sigma(T) ** 2, 1, rtol=1e-6
  )
  mixed = Process.q_sample(process, X0, T, NOISE)
  np.testing.assert_allclose(process.q_sample(X0, T, NOISE), mixed, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["", "log_snr"])
def test_respaced_process_equals_one_created_with_the_spacing(spacing):
  process = GaussianDiffusion.create(schedule="cosine", prediction="v")
  created = GaussianDiffusion.create(
    schedule="cosine", prediction="v", spacing=f"{spacing}20"
  )
  respaced = process.respaced(spacing, 20)
  for name in ("betas", "timesteps"):
    np.testing.assert_array_equal(getattr(respaced, name), getattr(created, name))
  assert respaced.prediction == "v"
  assert respaced.levels().alpha.size == respaced.end_time == 20
  last = respaced.network_time(jnp.array([19]))
  assert int(last[0]) == respaced.timesteps[-1] <= 999


def test_sample_t_draws_all_timesteps():
  t = create_process("gaussian", num_timesteps=30).sample_t(jax.random.key(0), 2000)
  assert t.dtype == jnp.int32
  assert set(np.asarray(t).tolist()) == set(range(30))


def test_error_names_the_process_and_its_unknown_setting():
  with pytest.raises(
    SettingError, match=r"^process = 'ddpm': accepted are edm, flow, gaussian"
  ):
    create_process("ddpm")
  for name in PROCESSES:
    with pytest.raises(SettingError, match=f"^pace = 3: is no setting .* '{name}'"):
      create_process(name, pace=3)
