"""A custom process needs one file and one registration."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion import PROCESSES, Process, create_process
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.process import Levels, like
from mdt_jax.diffusion.samplers import Sampler, sample
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.settings import Settings
from tests.seams.digits import assert_learns, train_losses
from tests.training.tiny import tiny_config


class LinearProcess(Process):
  """x_t = (1 - t) x0 + t noise for t in [0, 1). The network predicts noise - x0.

  With `times` (S,), which must increase, t counts the steps of a sampler.
  """

  def __init__(self, scale: float = 1000.0, times: np.ndarray | None = None):
    self.scale = scale
    self.times = times

  @property
  def end_time(self):
    return 1.0 if self.times is None else len(self.times)

  def real_time(self, t):
    return t if self.times is None else jnp.asarray(self.times, jnp.float32)[t]

  def alpha(self, t):
    return 1 - self.real_time(t)

  def sigma(self, t):
    return self.real_time(t)

  def target(self, x0, noise, t):
    return noise - x0

  def to_x0(self, output, x_t, t):
    return x_t - like(self.sigma(t), x_t) * output

  def sample_t(self, key, batch):
    return jax.random.uniform(key, (batch,))

  def network_time(self, t):
    return self.scale * self.real_time(t)

  def respaced(self, spacing, num_steps):
    return LinearProcess(self.scale, np.linspace(0, 0.99, num_steps + 1)[1:])

  def levels(self):
    alpha, sigma = 1 - self.times, self.times
    return Levels(alpha, sigma, np.log(alpha / sigma))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(PROCESSES, "linear", LinearProcess)


def test_custom_process_trains_on_digits(tmp_path):
  losses = train_losses(tmp_path, **{"diffusion.process": "linear"})
  assert_learns(losses)


def test_custom_process_is_self_consistent():
  process = create_process("linear")
  rng = np.random.default_rng(0)
  x0, noise = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
  t = jnp.array([0.1, 0.5, 0.9])
  x_t = process.q_sample(x0, t, noise)
  output = process.target(x0, noise, t)
  np.testing.assert_allclose(process.to_x0(output, x_t, t), x0, atol=1e-5)
  np.testing.assert_allclose(process.to_noise(output, x_t, t), noise, atol=1e-4)
  assert float(process.training_losses(output, x0, x_t, t, noise)["loss"].max()) == 0


@pytest.mark.parametrize("method", ["euler", "heun", "dpm++", "dpm++sde"])
def test_solvers_sample_from_a_custom_process(method):
  """With a perfect network, every path ends at the image."""
  process = create_process("linear")
  image = np.random.default_rng(1).standard_normal((2, 4, 4, 1)).astype(np.float32)
  x_T = np.random.default_rng(2).standard_normal(image.shape).astype(np.float32)

  def network(x, t):  # The velocity of the path to the image.
    return (x - image) / like(t / process.scale, x)

  sampler = Sampler.create(process, Guidance(), method=method, num_steps=8)
  key = jax.random.key(0)
  x_0 = sample(network, sampler.process, x_T, key, method=method)
  np.testing.assert_allclose(x_0, image, atol=1e-4)


def test_ddpm_sampling_needs_a_gaussian_process():
  with pytest.raises(SettingError, match="gaussian") as error:
    Sampler.create(create_process("linear"), Guidance(), method="ddpm")
  assert (error.value.setting, error.value.value) == ("method", "ddpm")


def test_guidance_interval_uses_the_network_time():
  """T is 10 here. The interval is relative to T, so only t = 5 is guided."""
  settings = {"diffusion.process": "linear", "sampling.method": "euler"}
  interval = {"sampling.cfg_interval": (0.2, 0.8), "sampling.cfg_power": 0.0}
  config = tiny_config(**settings, **interval, **{"sampling.cfg_scale": 3.0})
  config.diffusion.arguments.scale = 10.0
  guidance = build(config).sampler.guidance
  assert guidance.num_timesteps == 10.0
  labels, null = jnp.ones(1), jnp.zeros(1)
  guided = guidance.apply(lambda x, t, y: x + like(y, x), labels, null)
  x = jnp.zeros((1, 2, 2, 1))
  values = [float(guided(x, jnp.array([t]))[0, 0, 0, 0]) for t in (1.0, 5.0, 9.0)]
  assert values == [1.0, 3.0, 1.0]


def test_custom_process_arguments_are_saved_with_the_settings():
  config = tiny_config(**{"diffusion.process": "linear"})
  config.diffusion.arguments = {"times": (0.5, 0.9)}
  settings = Settings.from_config(config)
  saved = json.loads(json.dumps(settings.to_dict()))
  assert Settings.from_dict(saved) == settings


def test_custom_process_gets_its_arguments_from_the_config():
  config = tiny_config(**{"diffusion.process": "linear", "sampling.cfg_scale": 1.0})
  config.diffusion.arguments = {"scale": 10.0}
  assert build(config).process.scale == 10.0
  config.diffusion.arguments = {"speed": 10.0}
  with pytest.raises(
    SettingError, match=r"^config\.diffusion\.arguments\.speed = 10\.0"
  ):
    build(config)


def test_continuous_process_refuses_importance_sampling():
  config = tiny_config(
    **{"diffusion.process": "linear", "timestep_sampler": "loss-second-moment"}
  )
  with pytest.raises(SettingError, match=r"^config\.timestep_sampler = .* uniform"):
    build(config)
