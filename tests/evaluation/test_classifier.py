"""Scores of labelled samples: extremes, and real digits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mdt_jax.errors import SettingError
from mdt_jax.evaluation.classifier import conditional_accuracy, diversity


@functools.cache
def digits():
  pixels, labels = load_digits(return_X_y=True)
  return pixels[:1000] / 16, labels[:1000], pixels[1000:] / 16, labels[1000:]


def test_most_digits_that_were_not_fitted_are_recognised():
  assert conditional_accuracy(*digits()) > 0.95


def test_digits_under_wrong_labels_are_not():
  real, real_labels, other, labels = digits()
  assert conditional_accuracy(real, real_labels, other, (labels + 1) % 10) < 0.05


def test_one_class_cannot_be_told_apart():
  real = np.zeros((4, 2))
  with pytest.raises(SettingError, match="at least 2 classes"):
    conditional_accuracy(real, np.ones(4), real, np.ones(4))


def test_other_real_digits_are_as_diverse():
  assert diversity(*digits()) == pytest.approx(1, abs=0.05)


def test_samples_half_as_far_apart_are_half_as_diverse():
  real, labels, _, _ = digits()
  assert diversity(real, labels, 3 + real / 2, labels) == pytest.approx(0.5)


def test_equal_samples_of_a_class_are_not_diverse_at_all():
  real, labels, _, _ = digits()
  same = np.ones((20, 64))
  assert diversity(real, labels, same, np.arange(20) % 10) == 0


def test_classes_with_one_sample_do_not_count():
  real, labels, _, _ = digits()
  chosen = np.append(np.flatnonzero(labels == 3), np.flatnonzero(labels == 4)[0])
  found = diversity(real, labels, real[chosen], labels[chosen])
  assert found == pytest.approx(1)


def test_one_sample_of_each_class_is_refused():
  real, labels, other, _ = digits()
  with pytest.raises(SettingError, match=r"^images = .*diversity"):
    diversity(real, labels, other[:10], np.arange(10))
