"""Classifier-free guidance. models/test_mdt.py compares guided outputs of MDT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import guided, power_cosine_scale
from mdt_jax.diffusion.samplers import sample

LABELS = jnp.array([3, 5, 7])
NULL = 10
T = jnp.array([0, 400, 999])


class Network:
  """Returns channel + 10 * label, and counts the samples it receives."""

  def __init__(self, channels):
    self.channels = channels
    self.samples = 0

  def __call__(self, x, t, y):
    assert x.shape[0] == t.shape[0] == y.shape[0]
    self.samples += len(y)
    ramp = jnp.arange(float(self.channels))
    return jnp.zeros((*x.shape[:-1], 1)) + ramp + 10 * y[:, None, None, None]


def run(scale, power=4.0, channels=3, in_channels=4, out_channels=8, t=T):
  network = Network(out_channels)
  model_fn = guided(network, LABELS, NULL, scale=scale, power=power, channels=channels)
  return np.asarray(model_fn(jnp.zeros((3, 2, 2, in_channels)), t)), network


def halves(out_channels=8):
  """(conditional, unconditional) outputs of the network."""
  x = jnp.zeros((3, 2, 2, 4))
  network = Network(out_channels)
  return (
    np.asarray(network(x, T, LABELS)),
    np.asarray(network(x, T, jnp.full_like(LABELS, NULL))),
  )


@pytest.mark.parametrize("power", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 1.5, 3.8])
def test_scale_matches_the_formula_of_the_paper(scale, power):
  t = np.array([0, 1, 250, 500.5, 999])
  expected = [
    (1 - np.cos(np.pi * (1 - step / 1000) ** power)) / 2 * (scale - 1) + 1 for step in t
  ]
  actual = power_cosine_scale(jnp.asarray(t), scale, power)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [0.01, 1.0, 4.0])
def test_scale_rises_from_one_at_full_noise_to_cfg_scale(power):
  scales = power_cosine_scale(jnp.arange(1000, -1, -1), 3.8, power)
  assert (jnp.diff(scales) >= -1e-6).all()
  np.testing.assert_allclose(scales[jnp.array([0, -1])], [1, 3.8], rtol=1e-6)


def test_power_zero_gives_a_constant_scale():
  np.testing.assert_allclose(power_cosine_scale(T, 3.8, 0.0), 3.8, rtol=1e-6)


@pytest.mark.parametrize("num_timesteps", [10, 4000])
def test_scale_depends_on_the_relative_timestep(num_timesteps):
  half = jnp.array([num_timesteps // 2])
  scale = power_cosine_scale(half, 3.0, 1.0, num_timesteps)
  np.testing.assert_allclose(scale, 2.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("channels", "guided_count"), [(3, 3), (1, 1), (None, 4), (9, 4)]
)
def test_only_leading_channels_without_variance_are_guided(channels, guided_count):
  conditional, unconditional = halves()
  actual, _ = run(2.0, power=0.0, channels=channels)
  expected = conditional.copy()
  expected[..., :guided_count] += (conditional - unconditional)[..., :guided_count]
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_single_channel_without_variance_is_guided():
  conditional, unconditional = halves(1)
  actual, _ = run(2.0, power=0.0, in_channels=1, out_channels=1)
  np.testing.assert_allclose(actual, 2 * conditional - unconditional, rtol=1e-5)


def test_each_sample_is_guided_by_the_scale_at_its_timestep():
  conditional, unconditional = halves()
  actual, _ = run(3.8)
  scale = np.asarray(power_cosine_scale(T, 3.8, 4.0)).reshape(-1, 1, 1, 1)
  expected = (unconditional + scale * (conditional - unconditional))[..., :3]
  np.testing.assert_allclose(actual[..., :3], expected, rtol=1e-5)


def test_scale_zero_gives_the_unconditional_output():
  _, unconditional = halves()
  actual, _ = run(0.0, power=0.0, channels=None)
  np.testing.assert_allclose(actual[..., :4], unconditional[..., :4], atol=1e-5)


def test_scale_one_gives_the_conditional_output():
  np.testing.assert_array_equal(run(1.0)[0], halves()[0])


@pytest.mark.parametrize(("scale", "samples"), [(1.0, 3), (3.8, 6)])
def test_scale_one_skips_the_unconditional_half(scale, samples):
  assert run(scale)[1].samples == samples


def test_two_network_calls_equal_one_batch():
  def run_calls(one_batch):
    sizes = []

    def network(x, t, y):
      sizes.append(len(y))
      return Network(8)(x, t, y) + x.mean() + t[:, None, None, None]

    model_fn = guided(network, LABELS, NULL, scale=2.0, one_batch=one_batch)
    return model_fn(jnp.ones((3, 2, 2, 4)), T), sizes

  (together, calls), (apart, calls_apart) = run_calls(True), run_calls(False)
  np.testing.assert_array_equal(together, apart)
  assert (calls, calls_apart) == ([6], [3, 3])


# Guidance intervals.


def run_in_interval(interval, t, counts=None):
  """Guided outputs, compiled. Adds the batch size of each network call to `counts`."""

  def network(x, t, y):
    if counts is not None:
      jax.debug.callback(lambda y: counts.append(len(y)), y)
    return Network(8)(x, t, y)

  model_fn = guided(
    network, LABELS, NULL, scale=2.0, power=0.0, channels=None, interval=interval
  )
  output = jax.jit(model_fn)(jnp.zeros((3, 2, 2, 4)), t)
  jax.effects_barrier()
  return np.asarray(output)


@pytest.mark.parametrize(
  ("step", "samples"), [(99, 3), (100, 6), (400, 6), (600, 6), (601, 3), (999, 3)]
)
def test_unconditional_half_is_skipped_outside_the_interval(step, samples):
  counts = []
  output = run_in_interval((0.1, 0.6), jnp.full(3, step), counts)
  assert counts == [samples]
  conditional, unconditional = halves()
  expected = conditional.copy()
  if samples == 6:
    expected[..., :4] += (conditional - unconditional)[..., :4]
  np.testing.assert_allclose(output, expected, rtol=1e-6)


def test_interval_applies_to_each_sample_separately():
  output = run_in_interval((0.3, 0.6), T)  # T = 0, 400 and 999.
  conditional, unconditional = halves()
  expected = conditional.copy()
  expected[1, ..., :4] += (conditional - unconditional)[1, ..., :4]
  np.testing.assert_allclose(output, expected, rtol=1e-6)


def test_full_interval_compiles_without_a_branch():
  def has_branch(interval):
    model_fn = guided(Network(8), LABELS, NULL, scale=2.0, interval=interval)
    return "cond[" in str(jax.make_jaxpr(model_fn)(jnp.zeros((3, 2, 2, 4)), T))

  assert not has_branch((0.0, 1.0))
  assert has_branch((0.0, 0.9))


def test_sampler_guides_only_steps_inside_the_interval():
  counts = []

  def network(x, t, y):
    jax.debug.callback(lambda y: counts.append(len(y)), y)
    return x

  model_fn = guided(network, LABELS, NULL, scale=2.0, interval=(0.25, 0.75))
  diffusion = GaussianDiffusion.create(spacing="9", variance="fixed_small")
  x_T = jnp.ones((3, 2, 2, 4))
  sample(model_fn, diffusion, x_T, jax.random.key(0), method="dpm++")
  jax.effects_barrier()
  # Timesteps are 0, 125, 250, …, 874, 999. Those from 250 to 749 are guided.
  assert sorted(counts) == [3] * 4 + [6] * 5
