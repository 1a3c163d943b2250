"""Bits per dimension of the images of a data set."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.diffusion.process import Process
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import bits_per_dimension
from mdt_jax.experiment import build
from mdt_jax.models.registry import abstract_params
from tests import reference
from tests.training.tiny import tiny_config

INDICES = np.array([3, 900, 1796, 17, 50])


@functools.cache
def setup(**overrides):
  experiment = build(tiny_config(**overrides))
  bound = bits_per_dimension.make_bound(
    experiment.model, experiment.process, 4, clip_denoised=experiment.holds_pixels
  )
  return bound, reference.random_params(experiment.model), experiment.source


def terms(indices=INDICES, seed=0, batch_size=5):
  bound, params, source = setup()
  found = list(
    bits_per_dimension.bounds(
      bound, params, source, indices, seed=seed, batch_size=batch_size
    )
  )
  return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def test_bounds_return_one_total_per_image_and_one_term_per_step():
  shapes = {name: term.shape for name, term in terms().items()}
  assert shapes == {
    "total_bpd": (5,),
    "prior_bpd": (5,),
    "vb": (5, 4),
    "xstart_mse": (5, 4),
    "mse": (5, 4),
  }


@pytest.mark.parametrize("batch_size", [2, 3])
def test_bound_does_not_depend_on_the_batch_size(batch_size):
  whole, parts = terms(), terms(batch_size=batch_size)
  for name, term in whole.items():
    np.testing.assert_allclose(parts[name], term, rtol=1e-4, atol=1e-5)


def test_bounds_follow_the_order_of_the_indices():
  whole, reverse = terms(), terms(INDICES[::-1])
  np.testing.assert_allclose(reverse["vb"][::-1], whole["vb"], rtol=1e-4)


def test_another_seed_draws_different_noise():
  assert np.abs(terms(seed=1)["vb"] - terms()["vb"]).max() > 1e-3


def test_predicted_pixels_are_clipped():
  """Without clipping, x0 predicted at a high noise level leaves the pixel range."""
  assert terms()["xstart_mse"].max() <= 4


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_num_steps_outside_the_process_is_refused(num_steps):
  experiment = build(tiny_config())
  with pytest.raises(SettingError, match=rf"num_steps = {num_steps}: .*1000"):
    bits_per_dimension.make_bound(
      experiment.model, experiment.process, num_steps, clip_denoised=True
    )


def test_process_without_a_variational_bound_is_refused():
  class Other(Process):
    end_time = alpha = sigma = target = to_x0 = sample_t = None

  with pytest.raises(SettingError, match=r"metrics = 'bpd'.*not a Other"):
    bits_per_dimension.make_bound(None, Other(), clip_denoised=True)


def of_process(process):
  return tiny_config(**{"diffusion.process": process, "sampling.method": "euler"})


def test_density_of_a_flow():
  """An untrained flow does not move, so each pixel has the density of noise."""
  experiment = build(of_process("flow"))
  bound = bits_per_dimension.make_bound(
    experiment.model, experiment.process, 4, clip_denoised=True
  )
  params = jax.tree.map(jnp.zeros_like, abstract_params(experiment.model))
  source = experiment.source
  options = {"seed": 0, "batch_size": 5}
  (found,) = bits_per_dimension.bounds(bound, params, source, INDICES, **options)
  pixels = np.stack([source[int(i)]["image"] for i in INDICES]) / 127.5 - 1
  density = np.exp(-(pixels**2) / 2) / np.sqrt(2 * np.pi)
  expected = -np.log2(density * 2 / 255).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(found["total_bpd"], expected, atol=1e-3)
  np.testing.assert_allclose(found["divergence_bpd"], 0, atol=1e-6)
  assert set(found) == {"total_bpd", "prior_bpd", "divergence_bpd"}


def test_steps_of_a_flow_are_positive():
  experiment = build(of_process("edm"))
  with pytest.raises(SettingError, match=r"num_steps = 0: must lie in \[1, 100,000\]"):
    bits_per_dimension.make_bound(
      experiment.model, experiment.process, 0, clip_denoised=True
    )
