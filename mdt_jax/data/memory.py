"""Arrays in memory as a source of examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32

from mdt_jax.data.examples import Example
from mdt_jax.errors import SettingError


class MemorySource:
  """Images and labels that are arrays in memory.

  "image" is uint8 (H, W, C) for pixels, which the loader scales to [-1, 1] and may
  flip. For images of floats it is float32 (H, W, C), used as it is.

  Attributes:
    num_classes: labels lie in [0, num_classes).
    image_shape: (H, W, C).
    pixels: whether the images are uint8.

  Args:
    images: (N, H, W, C), uint8 or floats; floats must be finite.
    labels: (N,) whole numbers from 0; all zero unless given.
    num_classes: the largest label plus one unless given.

  Raises:
    SettingError: an argument has another shape, dtype or range.
  """

  def __init__(self, images: Any, labels: Any = None, num_classes: int | None = None):
    self._images = check_images(images)
    if self.pixels is False:
      with np.errstate(over="ignore"):  # What overflows is refused below.
        self._images = self._images.astype(np.float32, copy=False)
      if not np.isfinite(self._images).all():
        raise SettingError(
          "images", str(np.asarray(images).dtype), "must be finite numbers of float32"
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

  @property
  def pixels(self) -> bool:
    return self._images.dtype == np.uint8

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    return {"image": self._images[index], "label": self._labels[index]}


def check_images(images: Any) -> np.ndarray:
  """Returns images as an array of shape (N, H, W, C), N > 0, of uint8 or floats.

  Raises:
    SettingError: named "images", for another shape or dtype.
  """
  images = np.asanyarray(images)
  if images.dtype != np.uint8 and images.dtype.kind != "f":
    raise SettingError(
      "images", str(images.dtype), "must be uint8 for pixels, or floats"
    )
  if images.ndim != 4 or not images.size:
    raise SettingError(
      "images", images.shape, "must be of shape (N, H, W, C), with at least one image"
    )
  return images


def check_labels(labels: Any, count: int) -> Int32[np.ndarray, " N"]:
  """Returns the labels of `count` images; zeros for labels of None.

  Raises:
    SettingError: named "labels", for another length or dtype, or numbers out of range.
  """
  if labels is None:
    return np.zeros(count, np.int32)
  labels = np.asarray(labels)
  if labels.shape != (count,):
    raise SettingError(
      "labels", labels.shape, f"must be of shape ({count},), one for each image"
    )
  if labels.dtype.kind not in "iu":
    raise SettingError("labels", str(labels.dtype), "must be whole numbers")
  if labels.min() < 0:
    raise SettingError("labels", int(labels.min()), "must be 0 or more")
  if labels.max() >= 2**31:
    raise SettingError("labels", int(labels.max()), "must be below 2**31")
  return labels.astype(np.int32)
