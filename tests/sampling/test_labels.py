"""Labels: given by number or name, balanced, or random."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.sampling.labels import (
  choose_labels,
  draw_labels,
  imagenet_classes,
  parse_labels,
)


@pytest.mark.parametrize(
  ("name", "index"),
  [
    ("golden retriever", 207),
    ("Golden  Retriever", 207),
    ("tench", 0),
    ("Tinca tinca", 0),
    ("toilet tissue", 999),
    ("bathroom tissue", 999),
    ("cardigan welsh corgi", 264),
  ],
)
def test_class_name_or_synonym_gives_its_number(name, index):
  assert parse_labels("labels", [name], 1000).tolist() == [index]


def test_every_imagenet_class_has_a_name():
  classes = imagenet_classes()
  assert len(classes) == 1000
  assert all(name == name.strip() and name for names in classes for name in names)


def test_first_name_of_a_class_is_unique_for_most_classes():
  """A few names, such as "crane", belong to two classes. Their error lists both."""
  shared = 0
  for i, names in enumerate(imagenet_classes()):
    try:
      assert parse_labels("labels", [names[0]], 1000).tolist() == [i]
    except SettingError as error:
      assert " or " in error.accepted
      shared += 1
  assert shared <= 6


def test_numbers_and_names_may_be_mixed():
  labels = parse_labels("labels", ["3", 7, np.int32(5), "golden retriever"], 1000)
  assert labels.tolist() == [3, 7, 5, 207]


@pytest.mark.parametrize(
  ("labels", "num_classes", "message"),
  [
    ([10], 10, "labels = 10: labels of this model are 0 … 9"),
    ([-1], 10, "labels = -1: labels of this model are 0 … 9"),
    ([], 10, "labels = []: must hold at least one"),
    (np.zeros(0, int), 10, "labels = []: must hold at least one"),
    (np.zeros((2, 3), int), 10, "'array of shape (2, 3)': must be a label, or a list"),
    (jnp.zeros((1, 1), int), 10, "'array of shape (1, 1)': must be a label, or a list"),
    ([[1, 2]], 10, "labels = [1, 2]: must be a whole number or a name: labels of"),
    ([np.eye(3)], 10, "labels = 'array of shape (3, 3)': must be a whole number"),
    (12, 10, "labels = 12: labels of this model are 0 … 9"),
    (np.array([1, 12], np.uint8), 10, "labels = 12: labels of this model are 0 … 9"),
    (np.array([1.0]), 10, "labels = 1.0: must be a whole number"),
    (jnp.array(1.0), 10, "labels = 1.0: must be a whole number"),
    (np.array([True]), 10, "labels = True: must be a whole number"),
    ({3}, 10, "labels = {3}: must be a whole number"),
    (b"3", 10, "labels = b'3': must be a whole number"),
    ([1.5], 10, "labels = 1.5: must be a whole number or a name"),
    ([True], 10, "labels = True: must be a whole number or a name"),
    (["9" * 20], 10, "labels of this model are numbers, 0 … 9"),
    (["9" * 5_000], 1000, "is not a name of an ImageNet class"),
    (["golden retriever"], 10, "labels of this model are numbers, 0 … 9"),
    (["golden retriver"], 1000, "labels = 'golden retriver': "),
    (["crane"], 1000, "134 (crane) or 517 (crane)"),
  ],
)
def test_error_names_an_invalid_label(labels, num_classes, message):
  with pytest.raises(SettingError) as error:
    parse_labels("labels", labels, num_classes)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("labels", "expected"),
  [
    (3, [3]),
    ("3", [3]),
    ("tench", [0]),
    (np.int8(3), [3]),
    (np.array(3), [3]),
    (jnp.array(3), [3]),
    ((3, 1), [3, 1]),
    (range(3), [0, 1, 2]),
    (np.array([3, 1], np.uint8), [3, 1]),
    (np.array(["tench", "3"]), [0, 3]),
    (jnp.array([3, 1]), [3, 1]),
    ([jnp.array(3), np.int64(1)], [3, 1]),
  ],
)
def test_labels_may_be_scalars_sequences_or_arrays(labels, expected):
  parsed = parse_labels("labels", labels, 1000)
  assert (parsed.tolist(), parsed.dtype) == (expected, np.int64)


def test_null_label_is_none_or_num_classes():
  labels = [None, 3, 10]
  assert parse_labels("labels", labels, 10, has_null=True).tolist() == [10, 3, 10]
  assert parse_labels("labels", None, 10, has_null=True).tolist() == [10]


@pytest.mark.parametrize("label", [None, 10])
def test_null_label_is_refused_without_label_dropout(label):
  with pytest.raises(SettingError) as error:
    parse_labels("labels", [label], 10)
  assert (error.value.setting, error.value.value) == ("labels", label)
  assert "label_dropout = 0" in str(error.value)


def test_error_lists_the_null_label_when_it_is_accepted():
  with pytest.raises(SettingError, match="0 … 9, or 10 or None for the null label"):
    parse_labels("labels", [11], 10, has_null=True)


def test_balanced_labels_cycle_through_the_classes():
  labels = draw_labels("balanced", 25, 10, seed=0)
  assert np.bincount(labels).tolist() == [3] * 5 + [2] * 5


def test_random_labels_depend_only_on_seed_and_index():
  few, many = (draw_labels("random", n, 1000, seed=3) for n in (100, 50_000))
  np.testing.assert_array_equal(many[:100], few)
  assert (draw_labels("random", 100, 1000, seed=4) != few).any()
  counts = np.bincount(many, minlength=1000)
  assert 20 < counts.min() < counts.max() < 90  # Mean 50, standard deviation 7.


@pytest.mark.parametrize(
  ("labels", "count", "expected"),
  [
    (["3", "1"], None, [3, 1]),
    (["3", "1"], 5, [3, 1, 3, 1, 3]),
    (["none", "3"], 3, [10, 3, 10]),
    (["balanced"], 4, [0, 1, 2, 3]),
    (["balanced"], None, list(range(10))),
  ],
)
def test_labels_repeat_until_num_images_is_reached(labels, count, expected):
  found = choose_labels("labels", labels, count, 10, seed=0, has_null=True)
  assert found.tolist() == expected


def test_default_is_at_most_100_images():
  assert len(choose_labels("labels", ["random"], None, 1000, seed=0)) == 100
