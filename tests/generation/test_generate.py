"""Generating: an image depends on its seed and number, not on its batch."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from mdt_jax import config as settings
from mdt_jax.errors import SettingError
from mdt_jax.generation import generate
from tests import reference
from tests.training.tiny import tiny_config

LABELS = np.array([3, 1, 4, 1, 5])


@functools.cache
def make_all(method="ddpm"):
  config = tiny_config(**{"sampling.method": method})
  params = reference.random_params(settings.make_model(config))
  generator = generate.make_generator(config)

  def images(labels, seed=0, batch_size=5):
    batches = generate.generate_batches(
      generator, params, np.asarray(labels), seed=seed, batch_size=batch_size
    )
    return np.concatenate(list(batches))

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


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_is_refused(label):
  with pytest.raises(SettingError, match=rf"--labels = {label}: labels .* 0 … 9"):
    generate.check_labels("--labels", np.array([0, label]), 10)
