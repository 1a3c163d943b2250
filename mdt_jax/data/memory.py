"""A source of examples from arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from mdt_jax.data.examples import Example, count_labels
from mdt_jax.errors import SettingError
from mdt_jax.types import RESERVED_NAMES


class MemorySource:
  """A source of images and labels in memory.

  The entry "image" of an example is uint8 (H, W, C) if the images are uint8; the loader
  scales these to [-1, 1] and may flip them. Otherwise "image" is float32 (H, W, C); the
  loader neither scales nor flips floats.

  Attributes:
    num_classes: labels lie in [0, num_classes).
    image_shape: (H, W, C).
    pixels: whether the images are uint8.
    class_names: name of each class, or None.
    label_counts: label -> number of images.

  Args:
    images: (N, H, W, C), uint8 or floats; floats must be finite in float32.
    labels: (N,) integers of at least 0; None for zeros.
    num_classes: number of classes; None for the largest label plus one.
    class_names: name of each class; None for none.
    arrays: name -> (N, …), further entries of the examples, such as "vector" (N, V) for
      a network with `config.model.condition = "vector"`.

  Raises:
    SettingError: an argument has the wrong shape, dtype or range.
  """

  def __init__(
    self,
    images: Any,
    labels: Any = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    arrays: Mapping[str, Any] | None = None,
  ):
    self._images = check_images(images)
    if self.pixels is False:
      with np.errstate(over="ignore"):  # the check below finds overflow
        self._images = self._images.astype(np.float32, copy=False)
      if not np.isfinite(self._images).all():
        raise SettingError(
          "images", str(np.asarray(images).dtype), "must be finite in float32"
        )
    count, height, width, channels = self._images.shape
    self.image_shape: tuple[int, int, int] = (height, width, channels)
    self._labels = check_labels(labels, count)
    least = int(self._labels.max()) + 1
    if num_classes is not None and num_classes < least:
      raise SettingError(
        "num_classes", num_classes, f"must be at least {least}, the largest label + 1"
      )
    self.num_classes = least if num_classes is None else num_classes
    if class_names is not None and len(class_names) != self.num_classes:
      raise SettingError(
        "class_names", len(class_names), f"must be {self.num_classes}, one for a class"
      )
    self.class_names = class_names
    self._arrays = _check_arrays(arrays, count)
    self.label_counts = count_labels(self._labels)

  @property
  def array_names(self) -> tuple[str, ...]:
    """Names of the further entries of the examples."""
    return tuple(self._arrays)

  @property
  def pixels(self) -> bool:
    """Whether the images are uint8."""
    return self._images.dtype == np.uint8

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    arrays = {name: array[index] for name, array in self._arrays.items()}
    return {"image": self._images[index], "label": self._labels[index], **arrays}


def _check_arrays(arrays: Any, count: int) -> dict[str, np.ndarray]:
  """Returns arrays with a row for each image; raises SettingError for others."""
  if arrays is None:
    return {}
  if not isinstance(arrays, Mapping):
    accepted = "must be a dict: name -> array with a row for each image"
    raise SettingError("arrays", type(arrays).__name__, accepted)
  found, reserved = {}, [name for name in RESERVED_NAMES if name != "caption"]
  for name, values in arrays.items():
    if not isinstance(name, str) or name in reserved:
      accepted = f"must be named by texts other than {', '.join(reserved)}"
      raise SettingError("arrays", name, accepted)
    try:
      array = np.asarray(values)
    except ValueError:  # lists of different lengths
      array = np.asarray(None)
    if array.dtype.kind == "O" and all(isinstance(x, str) for x in array.flat):
      array = array.astype(np.str_)  # as pandas holds texts
    kinds, what = ("U", "texts") if name == "caption" else ("fiubU", "numbers or texts")
    if array.dtype.kind not in kinds:
      raise SettingError("arrays", name, f"must be an array of {what}")
    if array.shape[:1] != (count,):
      accepted = f"must have {count} rows, one an image, has the shape {array.shape}"
      raise SettingError("arrays", name, accepted)
    found[name] = array
  return found


def check_images(images: Any) -> np.ndarray:
  """Returns images as an array (N, H, W, C) of uint8 or floats, with N > 0.

  Raises:
    SettingError: setting "images": the shape or dtype is wrong.
  """
  images = np.asanyarray(images)
  if images.dtype != np.uint8 and images.dtype.kind != "f":
    raise SettingError("images", str(images.dtype), "must be uint8 (pixels) or floats")
  if images.ndim != 4 or not images.size:
    raise SettingError(
      "images", images.shape, "must have shape (N, H, W, C) with at least one image"
    )
  return images


def check_labels(labels: Any, count: int) -> Int32[np.ndarray, " N"]:
  """Returns the labels of `count` images as int32; zeros if `labels` is None.

  Raises:
    SettingError: setting "labels": the length or dtype is wrong, or a label is outside
      [0, 2**31).
  """
  if labels is None:
    return np.zeros(count, np.int32)
  labels = np.asarray(labels)
  if labels.shape != (count,):
    raise SettingError(
      "labels", labels.shape, f"must have shape ({count},): one label per image"
    )
  if labels.dtype.kind not in "iu":
    raise SettingError("labels", str(labels.dtype), "must be integers")
  if labels.min() < 0:
    raise SettingError("labels", int(labels.min()), "must be at least 0")
  if labels.max() >= 2**31:
    raise SettingError("labels", int(labels.max()), "must be below 2**31")
  return labels.astype(np.int32)
