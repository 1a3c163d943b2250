"""The generator: an image depends on seed and id. Inpainting and editing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.experiment import build
from mdt_jax.models.mdt import MDT
from mdt_jax.sampling.blocks import generate_batches
from mdt_jax.sampling.generator import Task, make_generator
from tests import reference
from tests.training.tiny import tiny_config

LABELS = np.array([3, 1, 4, 1, 5])


@functools.cache
def generator_of(method="ddpm"):
  """Returns a function that maps labels to images."""
  experiment = build(tiny_config(**{"sampling.method": method}))
  params = reference.random_params(experiment.model)
  generator = make_generator(experiment.model, experiment.sampler)

  def images(labels, seed=0, batch_size=5):
    parts = generate_batches(
      generator, params, np.asarray(labels), seed=seed, batch_size=batch_size
    )
    return np.concatenate(list(parts))

  return images


def test_generator_returns_one_image_per_label():
  assert generator_of()(LABELS).shape == (5, 8, 8, 1)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_image_does_not_depend_on_the_batch_size(method, batch_size):
  images = generator_of(method)
  whole, parts = images(LABELS), images(LABELS, batch_size=batch_size)
  np.testing.assert_allclose(parts, whole, atol=1e-4 * np.abs(whole).max())


def test_images_of_the_same_label_differ():
  first, second = generator_of()([7, 7], batch_size=2)
  assert np.abs(first - second).max() > 0.1


def test_another_seed_gives_different_images():
  images = generator_of()
  assert np.abs(images(LABELS, seed=1) - images(LABELS)).max() > 0.1


def test_another_label_gives_a_different_image():
  images = generator_of()
  assert np.abs(images([3, 3, 3, 3, 3])[1] - images(LABELS)[1]).max() > 1e-3


# Inpainting and editing: what the network receives at each step.

HIDDEN = np.zeros((8, 8), bool)
HIDDEN[:, 4:] = True
TOKENS = HIDDEN[::2, ::2].reshape(-1)


def seen_while_inpainting(monkeypatch, interpolation, **sampling):
  """Inpaints, and records (timestep, x, masked) for each call of the network."""
  seen = []

  def apply(self, variables, x, t, y, token_mask=None, **_):
    def remember(t, x, masked=token_mask is not None):
      seen.append((int(t[0]), np.asarray(x), masked))

    jax.debug.callback(remember, t, x)
    return jnp.zeros((*x.shape[:-1], 2))

  monkeypatch.setattr(MDT, "apply", apply)
  experiment = build(
    tiny_config(
      **{"sampling.num_steps": 4, "sampling.cfg_scale": 1.0},
      **{f"sampling.{name}": value for name, value in sampling.items()},
    )
  )
  sampler = experiment.sampler
  task = Task("inpaint", interpolation=interpolation, num_keep=8)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
  given = {"image": image, "hidden": HIDDEN, "hidden_tokens": TOKENS}
  x_0 = make_generator(experiment.model, sampler, task)(
    {}, np.array([1, 2]), np.array([0, 1]), np.uint32(0), given
  )
  jax.effects_barrier()
  seen.sort(key=lambda call: -call[0])
  return seen, image, np.asarray(x_0), sampler.process


@pytest.mark.parametrize("method", ["ddpm", "dpm++", "heun"])
def test_visible_pixels_have_the_noise_level_of_each_step(monkeypatch, method):
  seen, image, x_0, process = seen_while_inpainting(monkeypatch, 0.0, method=method)
  for t, x, _ in seen:
    a = process.alphas_cumprod[list(process.timesteps).index(t)]
    noise = (x - np.sqrt(a) * image)[:, ~HIDDEN] / np.sqrt(1 - a)
    assert 0.8 < noise.std() < 1.2
  np.testing.assert_array_equal(x_0[:, ~HIDDEN], image[:, ~HIDDEN])
  assert np.abs(x_0 - image)[:, HIDDEN].max() > 0.1


@pytest.mark.parametrize(
  ("interpolation", "masked"), [(0.0, []), (0.5, [0, 1]), (1.0, [0, 1, 2, 3])]
)
def test_side_interpolater_is_used_in_the_first_steps(
  monkeypatch, interpolation, masked
):
  seen, *_ = seen_while_inpainting(monkeypatch, interpolation)
  assert [i for i, call in enumerate(seen) if call[2]] == masked
  assert len(seen) == 4


@pytest.mark.parametrize(("strength", "calls"), [(1.0, 4), (0.7, 3), (0.01, 1)])
def test_edit_starts_at_the_noise_level_of_its_strength(monkeypatch, strength, calls):
  seen = []

  def apply(self, variables, x, t, y, token_mask=None, **_):
    jax.debug.callback(lambda t, x: seen.append((int(t[0]), np.asarray(x))), t, x)
    return jnp.zeros((*x.shape[:-1], 2))

  monkeypatch.setattr(MDT, "apply", apply)
  experiment = build(
    tiny_config(**{"sampling.num_steps": 4, "sampling.cfg_scale": 1.0})
  )
  process = experiment.sampler.process
  image = np.full((1, 8, 8, 1), 3, np.float32)
  task = Task("edit", strength=strength)
  make_generator(experiment.model, experiment.sampler, task)(
    {}, np.array([1]), np.array([0]), np.uint32(0), {"image": image}
  )
  jax.effects_barrier()
  seen.sort(key=lambda call: -call[0])
  assert [t for t, _ in seen] == process.timesteps[:calls][::-1].tolist()
  a = process.alphas_cumprod[calls - 1]
  noise = (seen[0][1] - np.sqrt(a) * image) / np.sqrt(1 - a)
  assert 0.7 < noise.std() < 1.3
  assert abs(noise.mean()) < 0.5
