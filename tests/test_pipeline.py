"""The interface for notebooks: what it gives, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import mdt_jax
from mdt_jax import SettingError
from mdt_jax import config as settings
from mdt_jax.training.checkpoints import save_model
from tests import reference
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = tiny_config()
  save_model(folder, config, reference.random_params(settings.make_model(config)))
  return mdt_jax.Pipeline.from_checkpoint(folder)


def test_images_are_float32_pixels(pipeline):
  images = pipeline([7, 3, 7])
  assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.float32)
  assert pipeline.draws_pixels


def test_a_call_with_the_same_settings_compiles_nothing_anew(pipeline):
  pipeline([1], num_steps=2)
  (generator,) = [
    g for key, g in pipeline._generators.items() if '"num_steps": 2' in key
  ]
  compiled = generator._cache_size()
  pipeline([2], num_steps=2, seed=5)
  assert generator._cache_size() == compiled == 1


def test_settings_of_a_call_do_not_stay(pipeline):
  before = pipeline.config.to_json()
  pipeline([1], num_steps=2, cfg_scale=1.0)
  assert pipeline.config.to_json() == before


@pytest.mark.parametrize(
  ("labels", "arguments", "message"),
  [
    ([10], {}, "labels = 10: labels of this model are 0 … 9"),
    ([], {}, "labels = []: must be a list of whole numbers"),
    (3, {}, "labels = 3: must be a list of whole numbers"),
    ([1.5], {}, "must be a list of whole numbers"),
    ([1], dict(seed=-1), "seed = -1: must lie in"),
    ([1], dict(batch_size=0), "batch_size = 0: must be at least 1"),
    ([1], dict(steps=5), "steps = 5: is no setting of sampling: cfg_channels"),
    ([1], dict(num_steps=5.5), "config.sampling.num_steps = 5.5: must be int"),
    ([1], dict(method="euler"), "config.sampling.method = 'euler': accepted are"),
  ],
)
def test_what_cannot_be_sampled_is_named(pipeline, labels, arguments, message):
  with pytest.raises(SettingError) as error:
    pipeline(labels, **arguments)
  assert message in str(error.value)
