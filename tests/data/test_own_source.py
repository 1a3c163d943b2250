"""A user's source: every example is checked, and errors name its index."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.own_source import CheckedSource
from mdt_jax.errors import SettingError
from mdt_jax.training import loop
from tests.training.tiny import tiny_dit_config


class Own:
  """16 grey images of 8x8, of which example 5 may be replaced."""

  num_classes = 10
  class_names = None

  def __init__(self, fifth=None):
    self.fifth = fifth

  def __len__(self):
    return 16

  def __getitem__(self, index):
    example = {"image": np.full((8, 8, 1), index, np.uint8), "label": index % 10}
    if index == 5 and self.fifth is not None:
      return self.fifth(example)
    return example


def failing(example):
  raise KeyError("no\nfile")


FIFTH = {
  "another shape": (lambda x: {**x, "image": x["image"][:7]}, r"\(7, 8, 1\)"),
  "no image": (lambda x: {"label": 1}, "image"),
  "no dict": (lambda x: x["image"], "dict"),
  "no label": (lambda x: {"image": x["image"]}, "label"),
  "floats": (lambda x: {**x, "image": x["image"] / 255}, "uint8 pixels"),
  "label of another type": (lambda x: {**x, "label": 0.5}, "float64"),
  "label out of range": (lambda x: {**x, "label": 10}, r"\[0, 10\), has 10"),
  "negative label": (lambda x: {**x, "label": np.int64(-1)}, "has -1"),
  "an exception": (failing, "KeyError: 'no"),
}


@pytest.mark.parametrize("case", FIFTH)
def test_error_names_the_index_of_the_example(case):
  fifth, message = FIFTH[case]
  source = CheckedSource(Own(fifth), (8, 8, 1))
  assert [int(source[i]["label"]) for i in (0, 4, 6)] == [0, 4, 6]
  with pytest.raises(
    SettingError, match=f"^source = 'Own': example 5 .*{message}"
  ) as e:
    source[5]
  assert len(str(e.value).splitlines()) == 1


def test_exception_of_the_source_is_kept_as_the_cause():
  with pytest.raises(SettingError) as caught:
    CheckedSource(Own(failing), (8, 8, 1))[5]
  assert isinstance(caught.value.__cause__, KeyError)


def test_first_example_is_checked_at_once():
  with pytest.raises(SettingError, match=r"example 0 .*\(8, 8, 3\)"):
    CheckedSource(Own(), (8, 8, 3))


@pytest.mark.parametrize("attribute", ["__getitem__", "num_classes"])
def test_source_that_lacks_an_attribute_is_refused(attribute):
  kept = {n: v for n, v in vars(Own).items() if n != attribute and n != "__dict__"}
  with pytest.raises(SettingError, match=attribute):
    CheckedSource(type("Other", (), {**kept})(), (8, 8, 1))


def test_checked_source_ends_and_survives_pickling():
  source = pickle.loads(pickle.dumps(CheckedSource(Own(), (8, 8, 1))))
  assert len([*source]) == 16
  with pytest.raises(IndexError):
    source[16]


def test_run_stops_at_the_example_with_its_index(tmp_path):
  with pytest.raises(SettingError, match=r"^source = 'Own': example 5 .*\(7, 8, 1\)"):
    loop.train(
      tiny_dit_config(num_steps=4),
      tmp_path,
      source=Own(FIFTH["another shape"][0]),  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("kind", [np.array, tuple, list])
@pytest.mark.parametrize("name", [str, int])
def test_names_of_classes_are_stored_as_texts(tmp_path, kind, name):
  source = Own()
  source.class_names = kind([name(i + 10) for i in range(10)])
  held = DataLabels.of(CheckedSource(source, (8, 8, 1)))
  held.write(tmp_path)
  stored = DataLabels.read(tmp_path, 10)
  assert stored is not None
  assert stored.names == held.names == [str(i + 10) for i in range(10)]
  assert held.describe().endswith(": 10, 11, 12, …")


def test_other_number_of_names_than_classes_is_refused():
  source = Own()
  source.class_names = ["ant", "bee"]
  with pytest.raises(SettingError, match=r"^source = 'Own': .*class_names.* has 2$"):
    CheckedSource(source, (8, 8, 1))
