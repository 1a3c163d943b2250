"""Labels of the images to draw: by number, by ImageNet's name, or drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int

from mdt_jax.errors import SettingError

# The synonyms of a class in WordNet, one class a line, in the order of ILSVRC 2012.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")
BALANCED, RANDOM, NONE = "balanced", "random", "none"
MAX_DEFAULT_COUNT = 100  # labels of all classes, where no count is given

# A number, a name, or None for the null label.
Label: TypeAlias = int | str | np.integer | None
# One label or N labels.
Labels: TypeAlias = Label | Sequence[Label] | np.ndarray | jax.Array


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], ...]:
  """The names of each of ImageNet's 1,000 classes, the usual name first."""
  lines = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
  return tuple(tuple(line.split(", ")) for line in lines)


def parse_labels(
  setting: str, labels: Labels, num_classes: int, *, has_null: bool = False
) -> Int[np.ndarray, "N"]:
  """Labels from numbers, or from names where the classes are ImageNet's.

  Args:
    setting: name of the argument in errors.
    labels: one label, a list or tuple of N labels, or an integer array (N,) of NumPy or
      JAX. A label is a number, a name, or the null label: None or `num_classes`.
    num_classes: classes of the model.
    has_null: whether the model was trained with a null label.

  Returns:
    (N,) int64, N = 1 for one label; `num_classes` stands for the null label.

  Raises:
    SettingError: no label, a nested list, an array of another rank, a label that is no
      whole number, a number outside 0 … num_classes - 1, a null label without
      `has_null`, or a name that is unknown or belongs to two classes.
  """
  found = [
    _parse(setting, label, num_classes, has_null) for label in _listed(setting, labels)
  ]
  return np.asarray(found, np.int64)


def choose_labels(
  setting: str,
  labels: Sequence[int | str],
  count: int | None,
  num_classes: int,
  seed: int,
  *,
  has_null: bool = False,
) -> Int[np.ndarray, "N"]:
  """A label for each image of a command.

  Args:
    setting: name of the argument in errors.
    labels: classes to repeat in turn, where "none" is the null label; or ["balanced"]
      or ["random"], see `draw_labels`.
    count: N; None for as many as there are labels, but at most MAX_DEFAULT_COUNT of
      all classes.
    num_classes: classes of the model.
    seed: of "random".
    has_null: see `parse_labels`.

  Returns:
    (N,) int64.

  Raises:
    SettingError: as `parse_labels`.
  """
  if list(labels) in ([BALANCED], [RANDOM]):
    count = count or min(num_classes, MAX_DEFAULT_COUNT)
    return draw_labels(str(labels[0]), count, num_classes, seed)
  named = [None if str(label).lower() == NONE else label for label in labels]
  parsed = parse_labels(setting, named, num_classes, has_null=has_null)
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


def _listed(setting: str, labels: Any) -> Sequence[Any]:
  """One label, a list, a tuple or an array, as a list that is not empty."""
  if hasattr(labels, "__array__"):
    array = np.asarray(labels)
    if array.ndim > 1:
      raise SettingError(
        setting, _shown(array), "must be a label, or a list or an array (N,) of labels"
      )
    labels = array.reshape(-1).tolist()
  elif not isinstance(labels, Sequence) or isinstance(labels, (str, bytes)):
    labels = [labels]
  if not len(labels):
    raise SettingError(setting, [], "must hold at least one label")
  return labels


def _parse(setting: str, label: Any, num_classes: int, has_null: bool) -> int:
  """The number of a label."""
  if hasattr(label, "__array__") and np.ndim(label) == 0:  # a number of NumPy or JAX
    label = np.asarray(label).item()
  if isinstance(label, str) and not label.strip().isdecimal():
    return _class_of(setting, label, num_classes)
  classes = f"labels of this model are 0 … {num_classes - 1}"
  null = f", or {num_classes} or None for the null label" if has_null else ""
  if isinstance(label, bool) or not isinstance(label, (int, str, type(None))):
    raise SettingError(
      setting, _shown(label), f"must be a whole number or a name: {classes}{null}"
    )
  number = num_classes if label is None else int(label)
  if number == num_classes and not has_null:
    raise SettingError(
      setting, label, f"{classes}; a model of label_dropout = 0 has no null label"
    )
  if not 0 <= number < num_classes + has_null:
    raise SettingError(setting, number, f"{classes}{null}")
  return number


def _shown(value: Any) -> Any:
  """A value whose repr is one line."""
  if hasattr(value, "__array__"):
    return f"array of shape {np.shape(value)}"
  return value if len(repr(value).splitlines()) == 1 else type(value).__name__


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
