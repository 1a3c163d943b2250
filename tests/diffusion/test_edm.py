"""The process "edm" and the sampler "edm", as MaskDiT's released code computes them.

MaskDiT (github.com/Anima-Lab/MaskDiT) uses EDM's preconditioning, loss and sampler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import create_process
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.process import mean_flat
from mdt_jax.diffusion.samplers import Sampler, sample
from tests import reference

RECORDED = reference.load("edm")
PROCESS = create_process("edm")
CHURN = {"churn": 4.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
# Rows of docs/parity.md.
LOOP_ROW = "MaskDiT, samplers edm, heun and euler"
INPUT_ROW, LOSS_ROW = "MaskDiT, noise levels and inputs", "MaskDiT, loss of EDM"
GUIDED = {"scale": 1.5, "power": 0.0, "channels": None}


def recorded(name):
  """A recorded array of images, channels last."""
  return reference.to_nhwc(RECORDED[name])


def network(x, t, y):
  """tanh(conv3x3(x) + tbias cos(3 t) + y ybias), the recorded network."""
  features = jax.lax.conv_general_dilated(
    x,
    RECORDED["toy/conv_oihw"].transpose(2, 3, 1, 0),
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  phase = jnp.cos(3 * t)[:, None, None, None]
  bias = (y @ RECORDED["toy/ybias"])[:, None, None]
  return jnp.tanh(features + RECORDED["toy/tbias"] * phase + bias)


@pytest.mark.parametrize(
  ("name", "method", "arguments", "guidance"),
  [
    ("heun", "edm", {}, Guidance()),
    ("heun", "heun", {}, Guidance()),
    ("heun_churn", "edm", CHURN, Guidance()),
    ("heun_churn_capped", "edm", {"churn": 40.0}, Guidance()),
    ("heun_cfg1p5", "edm", {}, Guidance(**GUIDED)),
    ("euler", "euler", {}, Guidance()),
  ],
)
def test_loops_match_reference(name, method, arguments, guidance):
  steps = int(RECORDED["loop/num_steps"])
  options = {"method": method, "num_steps": steps, "arguments": arguments}
  sampler = Sampler.create(PROCESS, guidance, **options)
  y = jnp.asarray(RECORDED["loop/y_onehot"])
  model_fn = guidance.apply(network, y, jnp.zeros_like(y))
  start = PROCESS.noise_scale * recorded("loop/latents")
  loop = jax.jit(
    lambda x: sample(
      model_fn,
      sampler.process,
      x,
      jax.random.key(0),
      method=method,
      arguments=sampler.arguments,
      noise=recorded("loop/churn_noise") if method == "edm" else None,
    )
  )
  expected = recorded(f"loop/{name}")
  reference.assert_matches(LOOP_ROW, loop(start), expected, 1e-4)


def test_levels_are_the_released_ones():
  levels = PROCESS.respaced("karras", int(RECORDED["loop/num_steps"])).levels()
  expected = RECORDED["loop/t_steps"][-2::-1]  # without 0, increasing
  np.testing.assert_allclose(np.exp(-levels.log_snr), expected, rtol=1e-9)


def test_losses_match_reference():
  x0, normal = recorded("loss/images"), RECORDED["loss/rnd_normal"].ravel()
  unit_noise, denoised = recorded("loss/unit_noise"), recorded("loss/D")
  t = PROCESS.p_mean + PROCESS.p_std * jnp.asarray(normal)
  sigma = jnp.exp(t)
  reference.assert_matches(INPUT_ROW, sigma, RECORDED["loss/sigma"], 1e-5)
  x_t = PROCESS.q_sample(x0, t, unit_noise)
  noisy = x_t / PROCESS.alpha(t)[:, None, None, None]
  reference.assert_matches(INPUT_ROW, noisy, recorded("loss/noisy"), 1e-5)
  # The output that stands for the recorded D.
  scale = PROCESS.sigma_data * PROCESS.sigma(t)[:, None, None, None]
  skip = PROCESS.to_x0(jnp.zeros_like(x_t), x_t, t)
  output = (denoised - skip) / scale
  losses = PROCESS.training_losses(output, x0, x_t, t, unit_noise)
  expected = RECORDED["loss/weight"] * mean_flat((denoised - x0) ** 2)
  reference.assert_matches(LOSS_ROW, losses["loss"], np.asarray(expected), 2e-5)


def test_training_draws_log_normal_levels():
  t = np.asarray(PROCESS.sample_t(jax.random.key(0), 100_000))
  assert abs(t.mean() - PROCESS.p_mean) < 0.02
  assert abs(t.std() - PROCESS.p_std) < 0.02
  bins = PROCESS.time_bin(jnp.asarray(t), 4)
  assert set(np.unique(bins)) == {0, 1, 2, 3}
