"""Bits a dimension of a data set: of the images asked for, in batches of any size."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from mdt_jax import factories
from mdt_jax.evaluation import bits_per_dimension
from tests import reference
from tests.training.tiny import tiny_config

INDICES = np.array([3, 900, 1796, 17, 50])


@functools.cache
def setup(**overrides):
  config = tiny_config(**overrides)
  params = reference.random_params(factories.make_model(config))
  return bits_per_dimension.make_bound(config, 4), params, factories.make_source(config)


def terms(indices=INDICES, seed=0, batch_size=5):
  bound, params, source = setup()
  found = list(
    bits_per_dimension.bounds(
      bound, params, source, indices, seed=seed, batch_size=batch_size
    )
  )
  return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def test_every_image_has_a_bound_and_every_step_a_term():
  shapes = {name: term.shape for name, term in terms().items()}
  assert shapes == {
    "total_bpd": (5,),
    "prior_bpd": (5,),
    "vb": (5, 4),
    "xstart_mse": (5, 4),
    "mse": (5, 4),
  }


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_bound_of_an_image_does_not_depend_on_the_batch_size(batch_size):
  whole, parts = terms(), terms(batch_size=batch_size)
  for name, term in whole.items():
    np.testing.assert_allclose(parts[name], term, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_images_is_kept():
  whole, reverse = terms(), terms(INDICES[::-1])
  np.testing.assert_allclose(reverse["vb"][::-1], whole["vb"], rtol=1e-4)


def test_another_seed_draws_other_noise():
  assert np.abs(terms(seed=1)["vb"] - terms()["vb"]).max() > 1e-3


def test_predicted_pixels_are_clipped():
  """x0 predicted from much noise is far outside of the range of pixels."""
  assert terms()["xstart_mse"].max() <= 4
