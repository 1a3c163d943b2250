"""Examples with the arrays that a network's condition reads, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mdt_jax.data.examples import Example, Source, SupportsReplacement
from mdt_jax.errors import SettingError
from mdt_jax.models.array_conditions import MASK_SUFFIX as MASK_SUFFIX
from mdt_jax.models.conditions import Condition

_IMAGES = ("image", "views")
_OF_EVERY_EXAMPLE = (*_IMAGES, "label")  # entries that all networks read


def with_condition(source: Source, condition: Condition) -> Source:
  """Returns a source whose examples hold the arrays of a condition, and no others.

  Captions as text are dropped too: no device holds texts.

  Args:
    source: the examples; a source with more arrays than images and labels has
      `array_names`.
    condition: the condition of the network. One of your own that names no arrays keeps
      all entries.

  Raises:
    SettingError: the first example lacks an array, or an array has another shape. Each
      further example is checked when it is read.
  """
  is_own = not condition.arrays() and condition.label is None
  has_captions = getattr(source, "has_captions", False)
  reads_arrays = condition.arrays() or getattr(source, "array_names", ())
  if not has_captions and (is_own or not reads_arrays):
    return source
  return ConditionedSource(source, condition, keeps_arrays=is_own)


class ConditionedSource:
  """The examples of a source, with the arrays of a condition alone; see above.

  Attributes:
    original: the source.

  Args:
    source, condition: see `with_condition`.
    keeps_arrays: whether to keep all entries except for captions as text.
  """

  def __init__(self, source: Source, condition: Condition, keeps_arrays: bool = False):
    self.original = source
    self.num_classes = source.num_classes
    self.image_shape = source.image_shape
    self.class_names = getattr(source, "class_names", None)
    self.label_counts = getattr(source, "label_counts", None)
    self._keeps_arrays = keeps_arrays
    self._required = condition.arrays()
    self._optional = condition.optional_arrays()
    if len(source):
      _ = self[0]

  def __len__(self) -> int:
    return len(self.original)

  def __getitem__(self, index: int) -> Example:
    return self._select(index, self.original[index])

  def first_readable(self, indices: Iterable[int]) -> Example:
    """Reads the first readable example of `indices`."""
    indices = list(indices)
    if not isinstance(self.original, SupportsReplacement):
      return self[indices[0]]
    return self._select(indices[0], self.original.first_readable(indices))

  def _select(self, index: int, example: Example) -> Example:
    """Returns an example without other arrays; raises SettingError if one is wrong."""
    if self._keeps_arrays:
      return {n: v for n, v in example.items() if n != "caption"}
    found = {n: v for n, v in example.items() if n in _OF_EVERY_EXAMPLE}
    where = f"example {index} of the data"
    for name, shape in self._required.items():
      if name not in example:
        held = ", ".join(n for n in example if n not in _OF_EVERY_EXAMPLE) or "none"
        accepted = f"{where} has no array of this name; its arrays are: {held}"
        raise SettingError("config.condition", name, accepted)
      found[name] = check_array("config.condition", name, example[name], shape, where)
    for name, shape in self._optional.items():
      if name in example:
        found[name] = check_array("config.condition", name, example[name], shape, where)
    return found

  def __getattr__(self, name: str) -> Any:
    # Such as `is_endless`. Pickle asks for methods before the object has attributes.
    if name.startswith("__") or name == "original":
      raise AttributeError(name)
    return getattr(self.original, name)


def check_array(
  setting: str, name: str, value: Any, shape: tuple[int, ...], where: str
) -> np.ndarray:
  """Returns an array of a condition as float32.

  Args:
    setting: setting named by the error.
    name: name of the array.
    value: the array.
    shape: expected shape.
    where: what holds the array, such as "example 3 of the data".

  Raises:
    SettingError: another shape, no numbers, or not finite.
  """
  array = np.asarray(value)
  if array.shape != shape:
    accepted = f"{where} must have the shape {shape}, has {array.shape}"
    raise SettingError(setting, name, accepted)
  if array.dtype.kind not in "fiub":
    raise SettingError(setting, name, f"{where} must hold numbers, has {array.dtype}")
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise SettingError(setting, name, f"{where} must be finite, has NaN or infinity")
  return array


def stack_arrays(examples: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Returns name -> (N, …) of N examples, without their images."""
  examples = list(examples)
  names = [name for name in examples[0] if name not in _IMAGES]
  return {name: np.stack([example[name] for example in examples]) for name in names}
