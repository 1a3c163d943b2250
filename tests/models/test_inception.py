"""The Inception network of 2015, compared with pytorch-fid from pixels to features."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from mdt_jax.evaluation.features import inception_features
from mdt_jax.models.inception import NUM_CLASSES, NUM_FEATURES, NUM_SPATIAL
from mdt_jax.pretrained.torch_inception import to_params
from tests import reference

TOLERANCE = 2e-4


@functools.cache
def features():
  params = to_params(reference.inception_tensors())
  return jax.jit(inception_features)(params, reference.load("inception")["images"])


@pytest.mark.parametrize(
  ("name", "recorded"),
  [
    ("pool3", "pool3"),
    ("spatial", "spatial"),
    ("logits", "logits_without_bias"),
  ],
)
def test_features_match_reference(name, recorded):
  expected = reference.load("inception")[recorded].reshape(3, -1)
  reference.assert_matches(f"Inception, {name}", features()[name], expected, TOLERANCE)


def test_feature_sizes_match_the_published_scores():
  shapes = {name: array.shape for name, array in features().items()}
  assert shapes == {"pool3": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008)}
  assert (NUM_FEATURES, NUM_SPATIAL, NUM_CLASSES) == (2048, 2023, 1008)


def test_features_of_an_image_do_not_depend_on_the_batch():
  params = to_params(reference.inception_tensors())
  image = reference.load("inception")["images"][1:2]
  alone = jax.jit(inception_features)(params, image)
  for name, whole in features().items():
    error = reference.relative_error(alone[name], np.asarray(whole[1:2]))
    assert error < 1e-5, name
