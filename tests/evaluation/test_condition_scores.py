"""The retrieval accuracy of conditions that are arrays."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.evaluation.condition_scores import (
  condition_vectors,
  retrieval_accuracy,
)


def make_set(count, seed, noise=0.1):
  """Images whose pixels are linear in their conditions."""
  rng = np.random.default_rng(seed)
  mixing = np.random.default_rng(0).standard_normal((5, 16))
  conditions = rng.standard_normal((count, 5))
  pixels = conditions @ mixing + noise * rng.standard_normal((count, 16))
  return pixels.astype(np.float32), conditions


def test_images_that_obey_their_conditions_are_found():
  assert retrieval_accuracy(*make_set(500, 1), *make_set(250, 2)) > 0.98


def test_images_without_relation_are_found_by_chance():
  pixels, _ = make_set(1000, 2)
  _, conditions = make_set(1000, 3)
  found = retrieval_accuracy(*make_set(500, 1), pixels, conditions)
  assert found == pytest.approx(0.01, abs=3 * np.sqrt(0.01 * 0.99 / 1000))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_spoilt_images_lower_the_score_by_their_share(share):
  pixels, conditions = make_set(1000, 2)
  spoilt = int(share * 1000)
  order = np.random.default_rng(0).permutation(1000)[:spoilt]
  pixels[order] = make_set(spoilt, 5)[0]
  found = retrieval_accuracy(*make_set(500, 1), pixels, conditions)
  assert found == pytest.approx(1 - share, abs=0.04)


def test_equal_conditions_count_as_found():
  pixels, conditions = make_set(200, 2, noise=0)
  conditions = np.repeat(conditions[:2], 100, axis=0)
  pixels = np.repeat(pixels[:2], 100, axis=0)
  assert retrieval_accuracy(*make_set(500, 1), pixels, conditions) == 1


def test_vectors_join_arrays_and_means_of_tokens():
  tokens = np.arange(12.0).reshape(2, 3, 2)
  arrays = {"b": np.ones((2, 1)), "a": tokens, "a_mask": [[1, 0, 1], [0, 0, 0]]}
  found = condition_vectors(arrays)
  np.testing.assert_array_equal(found, [[2, 3, 1], [0, 0, 1]])
  assert condition_vectors({}) is None
