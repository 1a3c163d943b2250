"""Checks of a source of examples that a user brings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mdt_jax.data.examples import Example, SupportsReplacement
from mdt_jax.errors import DataUnavailable, SettingError, one_line

_ARRAYS = ("image", "views")  # entries of an example that hold an image


class CheckedSource:
  """A user's source; each example is compared with the first one when it is read.

  Copies num_classes, class_names (as a list of texts), label_counts and array_names of
  the source.

  Args:
    source: must have `__len__`, `__getitem__` and `num_classes`; see `examples.Source`.
    image_shape: (H, W, C) of the input of the network, or of the autoencoder if images
      are encoded.

  Raises:
    SettingError: setting "source": an attribute is missing, there is no example, or
      class_names has another length than num_classes.
      `__getitem__` raises the error too, for an example that the source cannot read, or
      that has another shape, type or label; the error names the index of the example.
  """

  num_classes: int

  def __init__(self, source: Any, image_shape: tuple[int, int, int]):
    self.original, self._name = source, type(source).__name__
    for attribute in ("__len__", "__getitem__", "num_classes"):
      if not hasattr(source, attribute):
        raise SettingError("source", self._name, f"must have {attribute}")
    if not len(source):
      raise SettingError("source", self._name, "must hold at least one example")
    self.num_classes = source.num_classes
    self.image_shape = image_shape
    self.class_names = self._names_of_classes()
    self.label_counts = getattr(source, "label_counts", None)
    self.array_names = getattr(source, "array_names", ())
    self._is_pixels: bool | None = None
    self._is_pixels = _is_pixels(self[0])

  def __len__(self) -> int:
    return len(self.original)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} must lie in [0, {len(self)})")
    return self._read(index, lambda: self.original[index])

  def first_readable(self, indices: Iterable[int]) -> Example:
    """Reads the first example of `indices`, or the first that the source can read."""
    remaining, source = iter(indices), self.original
    index = next(remaining)
    if not isinstance(source, SupportsReplacement):
      return self[index]
    both = itertools.chain([index], remaining)
    return self._read(index, lambda: source.first_readable(both))

  def _names_of_classes(self) -> list[str] | None:
    """The source's names of classes as texts; None if it has none."""
    found = getattr(self.original, "class_names", None)
    if found is None:
      return None
    names = [str(name) for name in found]
    if names and len(names) != self.num_classes:
      raise SettingError(
        "source",
        self._name,
        f"must have class_names for num_classes = {self.num_classes} classes, has "
        f"{len(names)}",
      )
    return names or None

  def _read(self, index: int, read: Callable[[], Any]) -> Example:
    """Reads and checks example `index`."""
    try:
      example = read()
    except (SettingError, DataUnavailable):
      raise
    except Exception as error:
      raise self._error(
        index, f"be readable; it raises {type(error).__name__}: {one_line(error)}"
      ) from error
    self._check(index, example)
    return example

  def _check(self, index: int, example: Any) -> None:
    """Raises SettingError if an example does not fit."""
    if not isinstance(example, dict) or "label" not in example:
      raise self._error(index, 'be a dict with "label" and "image"')
    expected = {"image": self.image_shape, "views": (2, 2, *self.image_shape)}
    found = {name: np.shape(example[name]) for name in _ARRAYS if name in example}
    if not found or any(expected[name] != shape for name, shape in found.items()):
      shapes = {name: np.shape(value) for name, value in example.items()}
      raise self._error(
        index, f'have an "image" of shape {self.image_shape}; has shapes {shapes}'
      )
    if self._is_pixels not in (None, _is_pixels(example)):
      kinds = ("floats", "uint8 pixels")
      raise self._error(
        index, f'have an "image" of {kinds[bool(self._is_pixels)]}, as example 0'
      )
    label = np.asarray(example["label"])
    if not np.issubdtype(label.dtype, np.integer):
      raise self._error(index, f"have an integer label, has {label.dtype}")
    if label.size and not 0 <= label.min() <= label.max() < self.num_classes:
      shown = label.min() if label.min() < 0 else label.max()
      raise self._error(
        index,
        f"have a label in [0, num_classes) = [0, {self.num_classes}), has {shown}",
      )

  def _error(self, index: int, text: str) -> SettingError:
    """Returns the error for an example."""
    return SettingError("source", self._name, f"example {index} must {text}")


def _is_pixels(example: Example) -> bool:
  """Whether the image of an example is uint8."""
  return "image" in example and np.asarray(example["image"]).dtype == np.uint8
