"""Generating: an image depends on its seed and number, not on its batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import factories
from mdt_jax.models.mdt import MDT
from mdt_jax.sampling import batches
from mdt_jax.sampling.batches import Request
from tests import reference
from tests.training.tiny import tiny_config

LABELS = np.array([3, 1, 4, 1, 5])


@functools.cache
def make_all(method="ddpm"):
  config = tiny_config(**{"sampling.method": method})
  params = reference.random_params(factories.make_model(config))
  generator = batches.make_generator(config)

  def images(labels, seed=0, batch_size=5):
    made = batches.generate_batches(
      generator, params, np.asarray(labels), seed=seed, batch_size=batch_size
    )
    return np.concatenate(list(made))

  return images


def test_there_is_an_image_for_each_label():
  assert make_all()(LABELS).shape == (5, 8, 8, 1)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_an_image_does_not_depend_on_the_batch_size(method, batch_size):
  images = make_all(method)
  whole, parts = images(LABELS), images(LABELS, batch_size=batch_size)
  np.testing.assert_allclose(parts, whole, atol=1e-4 * np.abs(whole).max())


def test_the_same_label_twice_gives_two_images():
  first, second = make_all()([7, 7], batch_size=2)
  assert np.abs(first - second).max() > 0.1


def test_another_seed_gives_other_images():
  images = make_all()
  assert np.abs(images(LABELS, seed=1) - images(LABELS)).max() > 0.1


def test_the_label_changes_the_image():
  images = make_all()
  assert np.abs(images([3, 3, 3, 3, 3])[1] - images(LABELS)[1]).max() > 1e-3


def test_a_request_is_cut_into_blocks_and_the_last_one_is_filled_up():
  request = Request(LABELS, seed=0, block_size=2)
  assert [request.ids(block).tolist() for block in range(3)] == [[0, 1], [2, 3], [4]]
  labels, ids, given = request.inputs([2, 0])
  assert (labels.tolist(), ids.tolist()) == ([5, 3, 3, 1], [4, 0, 0, 1])
  assert given == {}


def test_each_image_of_a_request_has_what_is_given_to_it():
  images = np.arange(5.0).reshape(5, 1, 1, 1)
  own = Request(LABELS, seed=0, block_size=2, image=images).inputs([1])[2]
  assert own["image"].ravel().tolist() == [2, 3]
  same = Request(LABELS, seed=0, block_size=2, image=images[4]).inputs([1])[2]
  assert same["image"].ravel().tolist() == [4, 4]


# The paths of an image that is given, seen by the network.

HIDDEN = np.zeros((8, 8), bool)
HIDDEN[:, 4:] = True
TOKENS = HIDDEN[::2, ::2].reshape(-1)


def seen_while_inpainting(monkeypatch, interpolation, **sampling):
  """(timestep, x, whether a mask is given) of each call of the network."""
  seen = []

  def apply(self, variables, x, t, y, token_mask=None, **_):
    def remember(t, x, masked=token_mask is not None):
      seen.append((int(t[0]), np.asarray(x), masked))

    jax.debug.callback(remember, t, x)
    return jnp.zeros((*x.shape[:-1], 2))

  monkeypatch.setattr(MDT, "apply", apply)
  config = tiny_config(
    **{"sampling.num_steps": 4, "sampling.cfg_scale": 1.0},
    **{f"sampling.{name}": value for name, value in sampling.items()},
  )
  task = batches.Task("inpaint", interpolation=interpolation, num_keep=8)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
  given = {"image": image, "hidden": HIDDEN, "hidden_tokens": TOKENS}
  x_0 = batches.make_generator(config, task)(
    {}, np.array([1, 2]), np.array([0, 1]), np.uint32(0), given
  )
  jax.effects_barrier()
  seen.sort(key=lambda call: -call[0])
  return seen, image, np.asarray(x_0), factories.make_sampled_diffusion(config)


@pytest.mark.parametrize("method", ["ddpm", "dpm++", "heun"])
def test_what_is_visible_is_held_at_the_noise_of_each_step(monkeypatch, method):
  seen, image, x_0, diffusion = seen_while_inpainting(monkeypatch, 0.0, method=method)
  for t, x, _ in seen:
    a = diffusion.alphas_cumprod[list(diffusion.timesteps).index(t)]
    noise = (x - np.sqrt(a) * image)[:, ~HIDDEN] / np.sqrt(1 - a)
    assert 0.8 < noise.std() < 1.2
  np.testing.assert_array_equal(x_0[:, ~HIDDEN], image[:, ~HIDDEN])
  assert np.abs(x_0 - image)[:, HIDDEN].max() > 0.1


@pytest.mark.parametrize(
  ("interpolation", "masked"), [(0.0, []), (0.5, [0, 1]), (1.0, [0, 1, 2, 3])]
)
def test_the_side_interpolater_takes_the_first_steps(
  monkeypatch, interpolation, masked
):
  seen, *_ = seen_while_inpainting(monkeypatch, interpolation)
  assert [i for i, call in enumerate(seen) if call[2]] == masked
  assert len(seen) == 4


@pytest.mark.parametrize(("strength", "calls"), [(1.0, 4), (0.7, 3), (0.01, 1)])
def test_editing_starts_at_the_noise_of_its_strength(monkeypatch, strength, calls):
  seen = []

  def apply(self, variables, x, t, y, token_mask=None, **_):
    jax.debug.callback(lambda t, x: seen.append((int(t[0]), np.asarray(x))), t, x)
    return jnp.zeros((*x.shape[:-1], 2))

  monkeypatch.setattr(MDT, "apply", apply)
  config = tiny_config(**{"sampling.num_steps": 4, "sampling.cfg_scale": 1.0})
  diffusion = factories.make_sampled_diffusion(config)
  image = np.full((1, 8, 8, 1), 3, np.float32)
  batches.make_generator(config, batches.Task("edit", strength=strength))(
    {}, np.array([1]), np.array([0]), np.uint32(0), {"image": image}
  )
  jax.effects_barrier()
  seen.sort(key=lambda call: -call[0])
  assert [t for t, _ in seen] == diffusion.timesteps[:calls][::-1].tolist()
  a = diffusion.alphas_cumprod[calls - 1]
  noise = (seen[0][1] - np.sqrt(a) * image) / np.sqrt(1 - a)
  assert 0.7 < noise.std() < 1.3
  assert abs(noise.mean()) < 0.5
