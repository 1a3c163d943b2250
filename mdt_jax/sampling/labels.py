"""Labels of the images to draw: by number, by ImageNet's name, or drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mdt_jax.errors import SettingError

# The synonyms of a class in WordNet, one class a line, in the order of ILSVRC 2012.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")
BALANCED, RANDOM = "balanced", "random"
MAX_DEFAULT_COUNT = 100  # labels of all classes, where no count is given


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], ...]:
  """The names of each of ImageNet's 1,000 classes, the usual name first."""
  lines = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
  return tuple(tuple(line.split(", ")) for line in lines)


def parse_labels(
  setting: str, labels: Sequence[int | str] | np.ndarray, num_classes: int
) -> Int[np.ndarray, "N"]:
  """Labels from numbers, or from names where the classes are ImageNet's.

  Args:
    setting: name of the argument in errors.
    labels: N numbers or names.
    num_classes: classes of the model.

  Returns:
    (N,) int64.

  Raises:
    SettingError: not a list, an empty list, a label outside 0 … num_classes - 1, or a
      name that is unknown or belongs to two classes.
  """
  listed = not isinstance(labels, str) and np.ndim(labels) == 1 and len(labels)
  if not listed:
    raise SettingError(setting, labels, "must be a list of whole numbers or names")
  found = [_parse(setting, label, num_classes) for label in labels]
  return np.asarray(found, np.int64)


def choose_labels(
  setting: str,
  labels: Sequence[int | str],
  count: int | None,
  num_classes: int,
  seed: int,
) -> Int[np.ndarray, "N"]:
  """A label for each image of a command.

  Args:
    setting: name of the argument in errors.
    labels: classes to repeat in turn, or ["balanced"] or ["random"], see `draw_labels`.
    count: N; None for as many as there are labels, but at most MAX_DEFAULT_COUNT of
      all classes.
    num_classes: classes of the model.
    seed: of "random".

  Returns:
    (N,) int64.

  Raises:
    SettingError: as `parse_labels`.
  """
  if list(labels) in ([BALANCED], [RANDOM]):
    count = count or min(num_classes, MAX_DEFAULT_COUNT)
    return draw_labels(str(labels[0]), count, num_classes, seed)
  parsed = parse_labels(setting, labels, num_classes)
  return np.resize(parsed, count or len(parsed))


def draw_labels(
  how: str, count: int, num_classes: int, seed: int
) -> Int[np.ndarray, "N"]:
  """Labels by rule; label i does not depend on `count`.

  Args:
    how: "balanced": all classes in turn. "random": label i derives from (seed, i).
    count: N.
    num_classes: classes of the model.
    seed: of "random".

  Returns:
    (N,) int64.
  """
  if how == BALANCED:
    return np.arange(count) % num_classes
  # A stream of its own: the noise of the images derives from the same seed.
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
