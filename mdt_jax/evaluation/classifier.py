"""Scores of labelled samples of small data, by a classifier fitted on the real data."""

from __future__ import annotations

import numpy as np

from mdt_jax.errors import SettingError


def conditional_accuracy(
  real: np.ndarray,
  real_labels: np.ndarray,
  generated: np.ndarray,
  generated_labels: np.ndarray,
) -> float:
  """The share of samples that are recognised as the class they were drawn for.

  The classifier is a support vector machine with radial basis functions, fitted on the
  real features. On the 1,797 digits it is right on 0.97 of those left out of its fit.

  Args:
    real, generated: features (N, D) and (M, D), such as pixels.
    real_labels, generated_labels: (N,) and (M,) classes.

  Raises:
    SettingError: the real features are all of one class.
  """
  from sklearn.svm import SVC  # slow to import

  if len(np.unique(real_labels)) < 2:
    raise SettingError(
      "labels", np.unique(real_labels), "must be of at least 2 classes"
    )
  classifier = SVC(C=10).fit(real, real_labels)
  return float(np.mean(classifier.predict(generated) == generated_labels))


def diversity(
  real: np.ndarray,
  real_labels: np.ndarray,
  generated: np.ndarray,
  generated_labels: np.ndarray,
) -> float:
  """Mean distance of two samples of a class over that of real ones; 1 is as diverse.

  The mean is taken over the classes that have at least two of both.

  Args:
    real, generated, real_labels, generated_labels: see `conditional_accuracy`.

  Raises:
    SettingError: there is no such class.
  """
  ratios = []
  for label in np.unique(real_labels):
    of_real, of_generated = (
      features[labels == label]
      for features, labels in ((real, real_labels), (generated, generated_labels))
    )
    if min(len(of_real), len(of_generated)) > 1:
      ratios.append(_mean_distance(of_generated) / _mean_distance(of_real))
  if not ratios:
    raise SettingError(
      "images", len(generated), "diversity needs at least two of a class"
    )
  return float(np.mean(ratios))


def _mean_distance(x: np.ndarray) -> float:
  """Between two different rows."""
  from sklearn.metrics import pairwise_distances

  return pairwise_distances(x).sum() / (len(x) * (len(x) - 1))


SCORES = {"accuracy": conditional_accuracy, "diversity": diversity}
