"""TimestepSampler: ring buffers give the probabilities of the released queues."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError

NUM_TIMESTEPS = 5
PROCESS = GaussianDiffusion.create("cosine", NUM_TIMESTEPS)
HISTORY = 10
SAMPLER = TimestepSampler("loss-second-moment", PROCESS)
UPDATE = jax.jit(SAMPLER.update)


class Queues:
  """Equation 18 of arXiv 2102.09672, computed one loss at a time."""

  def __init__(self):
    self.losses = [[] for _ in range(NUM_TIMESTEPS)]

  def update(self, t, losses):
    for step, loss in zip(t, losses, strict=True):
      queue = self.losses[step]
      if len(queue) == HISTORY:
        queue.pop(0)
      queue.append(loss)

  def probabilities(self):
    if any(len(queue) < HISTORY for queue in self.losses):
      return np.full(NUM_TIMESTEPS, 1 / NUM_TIMESTEPS)
    p = np.sqrt((np.array(self.losses) ** 2).mean(axis=1))
    return p / p.sum() * (1 - 0.001) + 0.001 / NUM_TIMESTEPS


def run(batches):
  """(state, queues) after batches of (t, losses)."""
  state, queues = SAMPLER.init(), Queues()
  for t, losses in batches:
    state = UPDATE(state, jnp.asarray(t), jnp.asarray(losses, jnp.float32))
    queues.update(t, losses)
  return state, queues


def random_batches(count, batch, seed=0, steps=NUM_TIMESTEPS):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    t = rng.integers(0, steps, batch)
    yield t, rng.uniform(0, 1, batch) * (t + 1)


@functools.cache
def warm():
  return run(random_batches(20, 12))[0]


@pytest.mark.parametrize("count", [1, 3, 8, 20])
@pytest.mark.parametrize("batch", [4, 12])
def test_probabilities_match_queues_of_ten_losses(count, batch):
  state, queues = run(random_batches(count, batch))
  np.testing.assert_allclose(
    SAMPLER.probabilities(state), queues.probabilities(), rtol=1e-5
  )


@pytest.mark.parametrize("repeats", [2, HISTORY, HISTORY + 1, 3 * HISTORY + 4])
def test_repeated_timesteps_in_a_batch_enter_in_order(repeats):
  rng = np.random.default_rng(repeats)
  same = np.full(repeats, 2), rng.uniform(0, 5, repeats)
  state, queues = run([*random_batches(20, 12), same])
  kept = [sorted(row) for row in np.asarray(state.losses)]
  np.testing.assert_allclose(kept, [sorted(q) for q in queues.losses], rtol=1e-6)


@pytest.mark.parametrize("repeats", [4, HISTORY + 3])
def test_oldest_losses_leave_first_after_repeated_timesteps(repeats):
  rng = np.random.default_rng(repeats)
  same = np.full(repeats, 2), rng.uniform(0, 5, repeats)
  state, queues = run([*random_batches(20, 12), same, *random_batches(2, 12, seed=1)])
  kept = [sorted(row) for row in np.asarray(state.losses)]
  np.testing.assert_allclose(kept, [sorted(q) for q in queues.losses], rtol=1e-6)


def test_sampling_is_uniform_until_every_history_is_full():
  batches = [(np.full(HISTORY, t), np.full(HISTORY, t + 1)) for t in range(4)]
  almost = [*batches, (np.full(HISTORY - 1, 4), np.ones(HISTORY - 1))]
  state, _ = run(almost)
  np.testing.assert_allclose(SAMPLER.probabilities(state), 0.2, rtol=1e-6)


def test_probabilities_follow_the_losses_once_the_history_is_full():
  batches = [(np.full(HISTORY, t), np.full(HISTORY, t + 1)) for t in range(5)]
  state, _ = run(batches)
  expected = np.arange(1, 6) / 15 * 0.999 + 0.001 / 5
  np.testing.assert_allclose(SAMPLER.probabilities(state), expected, rtol=1e-5)


def test_probabilities_sum_to_one():
  np.testing.assert_allclose(SAMPLER.probabilities(warm()).sum(), 1, rtol=1e-6)


def test_timestep_with_zero_loss_has_a_minimum_probability():
  batches = [(np.full(HISTORY, t), np.full(HISTORY, float(t))) for t in range(5)]
  state, _ = run(batches)
  expected = 0.001 / NUM_TIMESTEPS
  np.testing.assert_allclose(SAMPLER.probabilities(state)[0], expected, rtol=1e-4)


def test_timesteps_are_drawn_with_their_probabilities():
  t, _ = SAMPLER.sample(jax.random.key(0), 20_000, warm())
  shares = np.bincount(t, minlength=NUM_TIMESTEPS) / len(t)
  np.testing.assert_allclose(shares, SAMPLER.probabilities(warm()), atol=0.015)


def test_weights_leave_the_expected_loss_unchanged():
  t, weights = SAMPLER.sample(jax.random.key(0), 1000, warm())
  p = np.asarray(SAMPLER.probabilities(warm()))
  weight_of = np.array([weights[np.argmax(t == s)] for s in range(NUM_TIMESTEPS)])
  np.testing.assert_allclose(p * weight_of, 1 / NUM_TIMESTEPS, rtol=1e-5)


def test_equal_timesteps_have_equal_weights():
  t, weights = (np.asarray(a) for a in SAMPLER.sample(jax.random.key(0), 100, warm()))
  assert len(set(zip(t, weights, strict=True))) == len(set(t))


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_draws_have_the_documented_types(name):
  sampler = TimestepSampler(name, PROCESS)
  t, weights = sampler.sample(jax.random.key(0), 7, sampler.init())
  assert (t.shape, t.dtype) == ((7,), jnp.int32)
  assert (weights.shape, weights.dtype) == ((7,), jnp.float32)


def test_uniform_sampler_draws_every_timestep_with_weight_one():
  sampler = TimestepSampler("uniform", PROCESS)
  t, weights = sampler.sample(jax.random.key(0), 20_000, None)
  np.testing.assert_allclose(np.bincount(t) / len(t), 0.2, atol=0.015)
  np.testing.assert_array_equal(weights, 1)


def test_uniform_sampler_has_no_state():
  sampler = TimestepSampler("uniform", PROCESS)
  assert sampler.init() is None
  assert sampler.update(None, jnp.zeros(3, jnp.int32), jnp.ones(3)) is None


def test_unknown_sampler_is_refused():
  with pytest.raises(SettingError) as error:
    TimestepSampler("importance", PROCESS)
  assert str(error.value) == (
    "timestep_sampler = 'importance': accepted are uniform, loss-second-moment"
  )
