"""A process of one's own: one file and one registration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import PROCESSES, Process, create_process
from mdt_jax.diffusion.process import like
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from tests.seams.digits import assert_learns, train_losses
from tests.training.tiny import tiny_config


class LinearProcess(Process):
  """x_t = (1 - t) x0 + t noise for t in [0, 1); the network predicts noise - x0."""

  def __init__(self, scale: float = 1000.0):
    self.scale = scale

  @property
  def end_time(self):
    return 1.0

  def alpha(self, t):
    return 1 - t

  def sigma(self, t):
    return t

  def target(self, x0, noise, t):
    return noise - x0

  def to_x0(self, output, x_t, t):
    return x_t - like(t, x_t) * output

  def sample_t(self, key, batch):
    return jax.random.uniform(key, (batch,))

  def network_time(self, t):
    return self.scale * t


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(PROCESSES, "linear", LinearProcess)


def test_digits_are_trained_with_it(tmp_path):
  losses = train_losses(tmp_path, **{"diffusion.process": "linear"})
  assert_learns(losses)


def test_its_methods_agree_with_each_other():
  process = create_process("linear")
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
  t = jnp.array([0.1, 0.5, 0.9])
  x_t = process.q_sample(x0, t, noise)
  output = process.target(x0, noise, t)
  np.testing.assert_allclose(process.to_x0(output, x_t, t), x0, atol=1e-5)
  np.testing.assert_allclose(process.to_noise(output, x_t, t), noise, atol=1e-4)
  assert float(process.training_losses(output, x0, x_t, t, noise)["loss"].max()) == 0


def test_its_arguments_come_from_the_config():
  config = tiny_config(**{"diffusion.process": "linear", "sampling.cfg_scale": 1.0})
  config.diffusion.arguments = {"scale": 10.0}
  assert build(config).process.scale == 10.0
  config.diffusion.arguments = {"speed": 10.0}
  with pytest.raises(SettingError, match=r"^config\.diffusion\.speed = 10\.0"):
    build(config)


def test_it_has_no_timesteps_for_importance_sampling():
  config = tiny_config(
    **{"diffusion.process": "linear", "timestep_sampler": "loss-second-moment"}
  )
  with pytest.raises(SettingError, match=r"^config\.timestep_sampler = .* uniform"):
    build(config)
