"""Which classes to draw: numbers, ImageNet's names, in turn or at random."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mdt_jax.errors import SettingError

# One class a line, in the order of ILSVRC 2012: its synonyms in WordNet.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")
BALANCED, RANDOM = "balanced", "random"


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], ...]:
  """The names of each of the 1,000 classes, the usual one first."""
  lines = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
  return tuple(tuple(line.split(", ")) for line in lines)


def parse_labels(
  setting: str, labels: Sequence[int | str] | np.ndarray, num_classes: int
) -> np.ndarray:
  """Labels (N,) int64 from numbers, or from names where the classes are ImageNet's.

  Raises:
    SettingError: no list, an empty one, a label outside 0 … num_classes - 1, or a
      name that is unknown or belongs to two classes.
  """
  listed = not isinstance(labels, str) and np.ndim(labels) == 1 and len(labels)
  if not listed:
    raise SettingError(setting, labels, "must be a list of whole numbers or names")
  found = [_parse(setting, label, num_classes) for label in labels]
  return np.asarray(found, np.int64)


def draw_labels(how: str, count: int, num_classes: int, seed: int) -> np.ndarray:
  """`count` labels: "balanced", all classes in turn, or "random", of (seed, i) each.

  Label i does not depend on `count`.
  """
  if how == BALANCED:
    return np.arange(count) % num_classes
  # The stream of labels is not that of anything else drawn from the seed.
  return np.random.default_rng((seed, 0x1ABE1)).integers(0, num_classes, count)


def _parse(setting: str, label: object, num_classes: int) -> int:
  if isinstance(label, str) and not label.strip().isdecimal():
    return _class_of(setting, label, num_classes)
  if isinstance(label, (bool, np.bool_)) or not isinstance(
    label, (int, np.integer, str)
  ):
    raise SettingError(setting, label, "must be a whole number or a name")
  if not 0 <= int(label) < num_classes:
    raise SettingError(
      setting, int(label), f"labels of this model are 0 … {num_classes - 1}"
    )
  return int(label)


def _class_of(setting: str, name: str, num_classes: int) -> int:
  classes = imagenet_classes()
  if num_classes != len(classes):
    raise SettingError(
      setting,
      name,
      f"labels of this model are numbers, 0 … {num_classes - 1}: names are "
      f"ImageNet's {len(classes)} classes",
    )
  wanted = " ".join(name.lower().split())
  # A name that is the usual one of a single class means that class.
  for candidates in (
    [i for i, names in enumerate(classes) if names[0].lower() == wanted],
    [i for i, names in enumerate(classes) if wanted in map(str.lower, names)],
  ):
    if len(candidates) == 1:
      return candidates[0]
  if candidates:
    which = " or ".join(f"{i} ({', '.join(classes[i])})" for i in candidates)
    raise SettingError(setting, name, f"names two classes: say {which}")
  raise SettingError(
    setting, name, "names no class of ImageNet; try one such as 'golden retriever'"
  )
