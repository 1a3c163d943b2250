"""Examples with the arrays that a network's condition reads, checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mdt_jax.data.examples import Example, Source, SupportsReplacement
from mdt_jax.errors import SettingError
from mdt_jax.models.conditions import Condition
from mdt_jax.types import RESERVED_NAMES


def with_condition(source: Source, condition: Condition) -> Source:
  """Returns a source whose examples hold the arrays of a condition, and no others.

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
  if is_own or not (condition.arrays() or getattr(source, "array_names", ())):
    return source
  return ConditionedSource(source, condition)


class ConditionedSource:
  """The examples of a source, with the arrays of a condition alone; see above.

  Attributes:
    original: the source.
  """

  def __init__(self, source: Source, condition: Condition):
    self.original = source
    self.num_classes = source.num_classes
    self.image_shape = source.image_shape
    self.class_names = getattr(source, "class_names", None)
    self.label_counts = getattr(source, "label_counts", None)
    self._condition = condition
    self._held: set[str] | None = None  # optional arrays of the first example
    if len(source):
      self._held = set(self[0]) & set(condition.optional_arrays())

  def __len__(self) -> int:
    return len(self.original)

  def __getitem__(self, index: int) -> Example:
    return self._select(index, self.original[index])

  def first_readable(self, indices: Iterable[int]) -> Example:
    """Reads the first readable example of `indices`."""
    remaining = iter(indices)
    first = next(remaining)
    if not isinstance(self.original, SupportsReplacement):
      return self[first]
    both = itertools.chain([first], remaining)
    return self._select(first, self.original.first_readable(both))

  def _select(self, index: int, example: Example) -> Example:
    """Returns an example without other arrays; raises SettingError if one is wrong."""
    condition, where = self._condition, f"example {index} of the data"
    found = {name: value for name, value in example.items() if name in RESERVED_NAMES}
    for name, shape in {**condition.arrays(), **condition.optional_arrays()}.items():
      setting = f"config.condition.{condition.kind_of(name)}"
      is_missing = name not in example
      if is_missing and name in condition.arrays():
        held = ", ".join(n for n in example if n not in RESERVED_NAMES) or "none"
        accepted = f"{where} has no array of this name; its arrays are: {held}"
        raise SettingError(setting, name, accepted)
      is_optional = name in condition.optional_arrays() and self._held is not None
      if is_optional and is_missing == (name in (self._held or ())):
        accepted = f"{where} must hold this array if, and only if, example 0 does"
        raise SettingError(setting, name, accepted)
      if isinstance(example.get(name), np.ndarray) and example[name].shape != shape:
        has = f"{where} has the shape {example[name].shape}"
        kind = condition.kind_of(name)
        accepted = f"{has}, and config.condition.{kind}_size"
        accepted += " and tokens_length say" if kind == "tokens" else " says"
        raise SettingError(setting, name, f"{accepted} {shape}")
      if not is_missing:
        found[name] = check_array(setting, name, example[name], shape, where)
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
  with np.errstate(over="ignore"):  # numbers too large for float32 become infinite
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    accepted = f"{where} must be finite in float32, is {array[first]} at {first}"
    raise SettingError(setting, name, accepted)
  return array


def arrays_of(example: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays of an example that belong to its condition."""
  return {n: value for n, value in example.items() if n not in RESERVED_NAMES}


def stack_arrays(arrays: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Returns name -> (N, …) from the arrays of N examples."""
  return {name: np.stack([some[name] for some in arrays]) for name in arrays[0]}
