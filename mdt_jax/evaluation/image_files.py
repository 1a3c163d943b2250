"""Image files to score: a folder of PNGs, as other code writes its samples."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mdt_jax.data import npy_format
from mdt_jax.data.class_labels import class_number
from mdt_jax.data.files import open_files
from mdt_jax.data.images import open_image
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.evaluation.image_streams import (
  LABELS,
  ImageStream,
  LabelledImages,
  NpzImages,
)
from mdt_jax.paths import input_file, local_path

GREY = ("1", "L", "LA")  # Pillow's modes of pictures without colours


class FileImages:
  """The images of a folder or a .tar file, all of one size.

  Subfolders, or the names up to the first underscore, are the classes of the images;
  see `data.folder_files`. If every class is a number, as in the folder that
  `python -m mdt_jax.sample --png` writes, the number is the label. Otherwise, classes
  count from 0 in the order of their names, and images of a single class have no labels.

  Attributes:
    shape: (N, H, W, C); C is 1 if the first image is grey, else 3.

  Args:
    path: the folder, or a .tar file.
    setting: name of the setting that holds `path`, for errors.

  Raises:
    SettingError: the path holds no images, or the first image cannot be read or has
      more than 8 bits for a channel. `batches` raises the error for any other such
      image, and for an image of another size or, unlike the first one, with or without
      colours; the error names the file.
  """

  def __init__(self, path: str | Path, setting: str = "path"):
    self._path, self._setting = str(local_path(setting, path)), setting
    with renamed_in_errors({"config.data.path": setting}):
      self._files = open_files(self._path)
    self._labels_of_classes = _labels_of(self._files.classes)
    first, _ = self._open(0)
    self._mode = "L" if first.mode in GREY else "RGB"
    height, width = first.height, first.width
    self.shape = (len(self._files), height, width, 1 if self._mode == "L" else 3)

  def __len__(self) -> int:
    return len(self._files)

  @property
  def has_labels(self) -> bool:
    """Whether `batches` yields labels."""
    return self._labels_of_classes is not None

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    for start in range(0, len(self), batch_size):
      indices = range(start, min(start + batch_size, len(self)))
      pixels, classes = zip(*map(self._read, indices), strict=True)
      labels = self._labels_of_classes
      yield (
        np.stack(pixels),
        None if labels is None else labels[np.asarray(classes)],
      )

  def _read(self, index: int) -> tuple[UInt8[np.ndarray, "H W C"], int]:
    """Pixels and class of an image."""
    image, label = self._open(index)
    if (image.mode in GREY) != (self._mode == "L"):
      kind, first = (
        "grey" if m in GREY else "coloured" for m in (image.mode, self._mode)
      )
      raise self._error(f"{self._files.name(index)} is {kind}, the first image {first}")
    pixels = np.asarray(image.convert(self._mode))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape != self.shape[1:]:
      size, first = ("x".join(map(str, s)) for s in (pixels.shape, self.shape[1:]))
      raise self._error(f"{self._files.name(index)} is {size}, the first image {first}")
    return pixels, label

  def _open(self, index: int) -> tuple[Image.Image, int]:
    """An image and its class."""
    try:
      data, label = self._files.read(index)
      image = open_image(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise nearly every type
      reason = " ".join(str(error).split())
      raise self._error(f"{self._files.name(index)} cannot be read: {reason}") from None
    if image.mode.startswith(("I", "F")):
      raise self._error(f"{self._files.name(index)} has more than 8 bits for a channel")
    return image, label

  def _error(self, accepted: str) -> SettingError:
    return SettingError(self._setting, self._path, accepted)


def open_image_stream(path: str | Path, setting: str = "path") -> ImageStream:
  """Opens images to score: an .npz file, a folder of image files, or a .tar file.

  Args:
    path: the file or the folder; see `NpzImages` and `FileImages`.
    setting: name of the setting that holds `path`, for errors.

  Raises:
    SettingError: the images cannot be read.
  """
  return (FileImages if has_image_files(path) else NpzImages)(path, setting)


def has_image_files(path: str | Path) -> bool:
  """Whether a path is a folder or a .tar file, and not a file of arrays."""
  path = os.path.expanduser(path)
  return os.path.isdir(path) or os.path.splitext(path)[1] == ".tar"


def has_labels(path: str | Path, setting: str = "path") -> bool:
  """Whether images, or statistics of images, have labels.

  Args:
    path: as for `open_image_stream`; an .npz file may hold statistics only.
    setting: name of the setting that holds `path`, for errors.

  Raises:
    SettingError: the path holds no images, or is no .npz file.
  """
  if has_image_files(path):
    return FileImages(path, setting).has_labels
  found = input_file(setting, path)
  try:
    with zipfile.ZipFile(found) as file:
      return not {LABELS, "labels"}.isdisjoint(npy_format.member_names(file))
  except npy_format.ERRORS as error:
    raise SettingError(
      setting, str(path), f"is not a readable .npz file: {error}"
    ) from None


def _labels_of(classes: Sequence[str]) -> np.ndarray | None:
  """The label of each class; None if there is one class without a number."""
  numbers = [class_number(name) for name in classes]
  if None not in numbers:
    return np.array(numbers, np.int64)
  return np.arange(len(classes)) if len(classes) > 1 else None
