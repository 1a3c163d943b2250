"""Conditional accuracy and diversity: extreme cases and real digits."""

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


def test_held_out_digits_have_high_accuracy():
  assert conditional_accuracy(*digits()) > 0.95


def test_wrong_labels_have_low_accuracy():
  real, real_labels, other, labels = digits()
  assert conditional_accuracy(real, real_labels, other, (labels + 1) % 10) < 0.05


def test_accuracy_of_a_single_class_is_refused():
  real = np.zeros((4, 2))
  with pytest.raises(SettingError, match="at least 2 classes"):
    conditional_accuracy(real, np.ones(4), real, np.ones(4))


def test_diversity_of_other_real_digits_is_one():
  assert diversity(*digits()) == pytest.approx(1, abs=0.05)


def test_diversity_scales_with_the_distance_of_samples():
  real, labels, _, _ = digits()
  assert diversity(real, labels, 3 + real / 2, labels) == pytest.approx(0.5)


def test_diversity_of_identical_samples_is_zero():
  real, labels, _, _ = digits()
  same = np.ones((20, 64))
  assert diversity(real, labels, same, np.arange(20) % 10) == 0


def test_diversity_ignores_classes_with_one_sample():
  real, labels, _, _ = digits()
  chosen = np.append(np.flatnonzero(labels == 3), np.flatnonzero(labels == 4)[0])
  found = diversity(real, labels, real[chosen], labels[chosen])
  assert found == pytest.approx(1)


def test_diversity_of_one_sample_per_class_is_refused():
  real, labels, other, _ = digits()
  with pytest.raises(SettingError, match=r"^images = .*diversity"):
    diversity(real, labels, other[:10], np.arange(10))
