"""Class labels of the images to draw, given by number, by name or by a rule."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int

from mdt_jax.data.class_labels import DataLabels, class_number
from mdt_jax.errors import SettingError
from mdt_jax.logs import printable

# WordNet's names of the classes of ILSVRC 2012: line i holds the names of class i.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")
BALANCED, RANDOM, NONE = "balanced", "random", "none"
MAX_SHOWN = 5  # names of classes in an error, at most
_WNID = re.compile(r"n\d{8}")  # number of an ImageNet class in WordNet
MAX_DEFAULT_COUNT = 100  # default number of "balanced" or "random" labels, at most

# A class number, the name of a class, or None for the null label (no class).
Label: TypeAlias = int | str | np.integer | None
# One label or N labels.
Labels: TypeAlias = Label | Sequence[Label] | np.ndarray | jax.Array


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], ...]:
  """The names of each of ImageNet's 1,000 classes; the most common name comes first."""
  lines = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
  return tuple(tuple(line.split(", ")) for line in lines)


def parse_labels(
  setting: str,
  labels: Labels,
  num_classes: int,
  *,
  has_null: bool = False,
  held: DataLabels | None = None,
) -> Int[np.ndarray, "N"]:
  """Converts labels to class numbers.

  Args:
    setting: name of the argument in errors.
    labels: one label, a list or tuple of N labels, or an integer NumPy or JAX array
      (N,). A label is a class number, the name of a class, or the null label: None or
      `num_classes`. Names are those of the data; see `_class_of` for ImageNet's.
    num_classes: number of classes of the model.
    has_null: whether the model was trained with a null label.
    held: the labels of the training data, with names; None if unknown.

  Returns:
    (N,) int64 class numbers; N = 1 for one label. The null label is `num_classes`.

  Raises:
    SettingError: there is no label, or a label is not an integer or a name, is out of
      range, is an unknown or ambiguous name, or is a null label although `has_null` is
      False.
  """
  found = [
    _parse(setting, label, num_classes, has_null, held)
    for label in _listed(setting, labels)
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
  held: DataLabels | None = None,
) -> Int[np.ndarray, "N"]:
  """The label of each image that `mdt_jax.sample` draws.

  Args:
    setting: name of the argument in errors.
    labels: labels to repeat until there are N of them, where "none" is the null label;
      or ["balanced"] or ["random"], see `draw_labels`.
    count: number N of images. None: one for each label; for "balanced" and "random",
      the number of classes, but at most MAX_DEFAULT_COUNT.
    num_classes: number of classes of the model.
    seed: seed of "random".
    has_null, held: see `parse_labels`.

  Returns:
    (N,) int64 class numbers.

  Raises:
    SettingError: see `parse_labels`.
  """
  if list(labels) in ([BALANCED], [RANDOM]):
    drawn = np.arange(num_classes) if held is None else held.labels
    count = count or min(len(drawn), MAX_DEFAULT_COUNT)
    return drawn[draw_labels(str(labels[0]), count, len(drawn), seed)]
  named = [None if str(label).lower() == NONE else label for label in labels]
  parsed = parse_labels(setting, named, num_classes, has_null=has_null, held=held)
  return np.resize(parsed, count or len(parsed))


def draw_labels(
  how: str, count: int, num_classes: int, seed: int
) -> Int[np.ndarray, "N"]:
  """Balanced or random labels; label i does not depend on `count`.

  Args:
    how: "balanced": classes 0, 1, 2, … in turn. "random": uniformly random classes;
      label i derives from (seed, i).
    count: number N of labels.
    num_classes: number of classes of the model.
    seed: seed of "random".

  Returns:
    (N,) int64 class numbers.
  """
  if how == BALANCED:
    return np.arange(count) % num_classes
  # The constant makes the labels independent of the noise, which has the same seed.
  return np.random.default_rng((seed, 0x1ABE1)).integers(0, num_classes, count)


def _listed(setting: str, labels: Any) -> Sequence[Any]:
  """Converts one label, a list, a tuple or an array to a list that is not empty."""
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


def _parse(
  setting: str, label: Any, num_classes: int, has_null: bool, held: DataLabels | None
) -> int:
  """The class number of one label; raises SettingError for an invalid label."""
  if hasattr(label, "__array__") and np.ndim(label) == 0:  # a number of NumPy or JAX
    label = np.asarray(label).item()
  if isinstance(label, str):
    found = class_number(label)
    if found is None:
      return _class_of(setting, label, num_classes, held)
    label = found
  classes = f"labels of this model are 0 … {num_classes - 1}"
  null = f", or {num_classes} or None for the null label" if has_null else ""
  if isinstance(label, bool) or not isinstance(label, (int, type(None))):
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
  """A replacement for `value` in errors whose repr fits on one line."""
  if hasattr(value, "__array__"):
    return f"array of shape {np.shape(value)}"
  return value if len(repr(value).splitlines()) == 1 else type(value).__name__


def _class_of(
  setting: str, name: str, num_classes: int, held: DataLabels | None
) -> int:
  """The number of the class with this name.

  Names of the data come first. ImageNet's names are valid too if the network has 1,000
  classes and the data has no names, or has ImageNet's 1,000 numbers (n01440764) as
  names.
  """
  if held is not None and len(held.names):
    found = _find(setting, name, held.labels.tolist(), [(n,) for n in held.names])
    if found is not None:
      return found
    wnids = sum(bool(_WNID.fullmatch(name)) for name in held.names)
    if wnids < num_classes:
      shown = ", ".join(map(printable, held.names[:MAX_SHOWN]))
      shown += ", …" if len(held.names) > MAX_SHOWN else ""
      raise SettingError(
        setting,
        name,
        f"is no class of the data: {shown}; or give a number, 0 … {num_classes - 1}",
      )
  classes = imagenet_classes()
  if num_classes != len(classes):
    raise SettingError(
      setting,
      name,
      f"labels of this model are numbers, 0 … {num_classes - 1}; names need a model "
      f"with the {len(classes)} classes of ImageNet",
    )
  found = _find(setting, name, range(num_classes), classes)
  if found is None:
    raise SettingError(
      setting,
      name,
      "is not a name of an ImageNet class; a valid name is 'golden retriever'",
    )
  return found


def _find(
  setting: str, name: str, labels: Sequence[int], classes: Sequence[Sequence[str]]
) -> int | None:
  """The label whose class has this name; None if there is none.

  Args:
    setting: name of the argument in errors.
    name: the name; case and repeated spaces are ignored unless a class has the very
      same name.
    labels: labels of the classes.
    classes: names of each class.

  Raises:
    SettingError: several classes have this name.
  """
  wanted = _folded(name)
  # The most common name of a class has priority over other names of other classes.
  for matches in (
    [i for i, names in enumerate(classes) if names[0] == name],
    [i for i, names in enumerate(classes) if _folded(names[0]) == wanted],
    [i for i, names in enumerate(classes) if wanted in map(_folded, names)],
  ):
    if len(matches) == 1:
      return labels[matches[0]]
  if not matches:
    return None
  which = " or ".join(f"{labels[i]} ({', '.join(classes[i])})" for i in matches)
  raise SettingError(setting, name, f"is ambiguous: give the number, {which}")


def _folded(name: str) -> str:
  """The name in lower case, with single spaces."""
  return " ".join(name.lower().split())
