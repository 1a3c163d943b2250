"""Metrics: agreement with ADM, and properties of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from mdt_jax.errors import SettingError
from mdt_jax.evaluation import metrics
from mdt_jax.evaluation.metrics import (
  RunningStatistics,
  Statistics,
  feature_statistics,
  frechet_distance,
  inception_score,
  precision_recall,
)
from tests import reference


def recorded(name):
  return reference.load("metrics")[name]


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


# Recorded values of ADM.


def test_frechet_distance_matches_reference():
  found = frechet_distance(recorded("real"), recorded("fake"))
  reference.assert_matches("FID", found, recorded("fid"), 1e-6)


@pytest.mark.parametrize("size", [100, 5000])
def test_inception_score_matches_reference(size):
  found = inception_score(recorded("logits"), size)
  expected = recorded(f"inception_score_split{size}")
  reference.assert_matches("Inception score", found, expected, 1e-5)


@pytest.mark.parametrize("distances_a_block", [2**25, 2**13])
def test_precision_and_recall_match_reference(monkeypatch, distances_a_block):
  monkeypatch.setattr(metrics, "_DISTANCES_A_BLOCK", distances_a_block)
  found = precision_recall(recorded("real"), recorded("fake"))
  assert found == (recorded("precision_k3"), recorded("recall_k3"))


# Statistics.


@pytest.mark.parametrize("sizes", [[5000], [1, 1, 4998], [700, 1500, 64, 2736]])
def test_running_statistics_do_not_depend_on_the_batches(sizes):
  features = 5 + normal(5000, 4) @ normal(4, 4, seed=1)
  running = RunningStatistics()
  for part in np.split(features, np.cumsum(sizes)[:-1]):
    running.add(part)
  found = running.result()
  np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(found.covariance, np.cov(features.T), rtol=1e-10)


def test_covariance_is_exact_for_a_large_mean():
  features = 1e6 + normal(3000, 3)
  found = feature_statistics(features).covariance
  np.testing.assert_allclose(found, np.cov(features.T), rtol=1e-7, atol=1e-10)


def test_statistics_of_one_image_are_refused():
  with pytest.raises(SettingError, match=r"images = 1: .*at least 2"):
    feature_statistics(normal(1, 3))


# Frechet distance.


def test_distance_of_diagonal_gaussians_matches_closed_form():
  first = Statistics(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
  second = Statistics(np.array([3.0, 2.0]), np.diag([1.0, 16.0]))
  assert frechet_distance(first, second) == pytest.approx(
    4 + (2 - 1) ** 2 + (3 - 4) ** 2
  )


def test_distance_matches_the_matrix_square_root_formula():
  """ADM uses this formula. It is exact for covariances far from singular."""
  first = feature_statistics(normal(300, 8))
  second = feature_statistics(normal(300, 8, seed=1) @ normal(8, 8, seed=2))
  covariances = first.covariance, second.covariance
  expected = np.square(first.mean - second.mean).sum()
  expected += np.trace(sum(covariances)) - 2 * np.trace(
    sqrtm(np.dot(*covariances)).real
  )
  assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [10, 200])
def test_distance_to_itself_is_zero_even_if_singular(count):
  features = normal(count, 64)
  assert abs(frechet_distance(features, features)) < 1e-10 * 64


def test_distance_is_symmetric():
  first, second = normal(20, 30), normal(90, 30, seed=1)
  there, back = frechet_distance(first, second), frechet_distance(second, first)
  assert there == pytest.approx(back, rel=1e-12)


def test_distance_of_singular_covariances_is_exact():
  """tr (C1 C2)^(1/2) is the nuclear norm of R1^T R2, where Ci = Ri Ri^T."""
  first, second = normal(10, 64), normal(12, 64, seed=1)
  roots = [(x - x.mean(0)).T / np.sqrt(len(x) - 1) for x in (first, second)]
  expected = np.square(first.mean(0) - second.mean(0)).sum()
  expected += sum(np.square(root).sum() for root in roots)
  expected -= 2 * np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
  assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_distance_of_different_dimensions_is_refused():
  with pytest.raises(SettingError, match=r"\(5,\).*\(4,\)"):
    frechet_distance(normal(9, 4), normal(9, 5))


# Inception score.


def test_inception_score_of_certain_predictions_is_num_classes():
  assert inception_score(1e4 * np.eye(7)) == pytest.approx(7)


def test_inception_score_of_equal_predictions_is_one():
  assert inception_score(np.tile(normal(1, 9), (20, 1))) == pytest.approx(1)


def test_splits_are_in_order_and_the_last_may_be_smaller():
  logits = 1e4 * np.eye(5)
  found = inception_score(logits, split_size=2)
  assert found == pytest.approx(np.mean([2, 2, 1]))


def test_inception_score_of_no_images_is_refused():
  with pytest.raises(SettingError, match="images = 0"):
    inception_score(np.zeros((0, 4)))


# Precision and recall.


def by_definition(real, generated, k=3):
  def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=-1)

  def share(points, features):
    radii = np.sort(distances(features, features), axis=1)[:, k]
    return np.mean((distances(points, features) <= radii).any(axis=1))

  return share(generated, real), share(real, generated)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_precision_and_recall_are_exact_far_from_the_origin(scale):
  real, generated = 100 + normal(90, 5), 100 + scale * normal(70, 5, seed=1)
  assert precision_recall(real, generated) == by_definition(real, generated)


def test_samples_of_one_of_two_modes_have_recall_one_half():
  real = np.concatenate([normal(50, 3), 100 + normal(50, 3, seed=1)])
  precision, recall = precision_recall(real, real[:50])
  assert precision == 1
  assert recall == 0.5


@pytest.mark.parametrize(("real", "generated"), [(3, 9), (9, 3)])
def test_precision_of_too_few_images_is_refused(real, generated):
  with pytest.raises(SettingError, match=r"images = 3: .* more than 3"):
    precision_recall(normal(real, 2), normal(generated, 2))
