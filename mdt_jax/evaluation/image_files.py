"""Image files to score: a folder of PNGs, as other code writes its samples."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mdt_jax import buckets
from mdt_jax.data import npy_format
from mdt_jax.data.class_labels import DataLabels, class_number
from mdt_jax.data.files import open_files
from mdt_jax.data.images import open_image
from mdt_jax.errors import SettingError, one_line, renamed_in_errors
from mdt_jax.evaluation.image_streams import (
  LABELS,
  ImageStream,
  LabelledImages,
  NpzImages,
  open_npz,
)
from mdt_jax.logs import logger, printable
from mdt_jax.paths import any_path, input_file, local_path

GREY = ("1", "L", "LA")  # Pillow's modes of pictures without colours


class FileImages:
  """The images of a folder or a .tar file, all of one size.

  Subfolders, or the names up to the first underscore, are the classes of the images;
  see `data.folder_files`. Classes in `label_of` have the labels given there. If
  `label_of` holds no class of the images, then

  - if every class is a number, as in the folder that `python -m mdt_jax.sample --png`
    writes, the number is the label;
  - otherwise, classes count from 0 in the order of their names, and images of a single
    class have no labels.

  Attributes:
    shape: (N, H, W, C); C is 1 if the first image is grey, else 3.

  Args:
    path: the folder, or a .tar file.
    setting: name of the setting that holds `path`, for errors.
    label_of: name of a class -> its label, for classes of a run or of other images.

  Raises:
    SettingError: the path holds no images, or the first image cannot be read or has
      more than 8 bits for a channel. `batches` raises the error for any other such
      image, and for an image of another size or, unlike the first one, with or without
      colours; the error names the file.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    setting: str = "path",
    label_of: Mapping[str, int] = MappingProxyType({}),
  ):
    self._path, self._setting = str(local_path(setting, path)), setting
    with renamed_in_errors({"config.data.path": setting}):
      self._files = open_files(self._path)
    self._labels_of_classes = _labels_of(self._path, self._files.classes, label_of)
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

  @property
  def label_of(self) -> dict[str, int]:
    """Name of a class -> its label; empty without labels."""
    labels = self._labels_of_classes
    if labels is None:
      return {}
    return dict(zip(self._files.classes, labels.tolist(), strict=True))

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
      reason = one_line(error)
      raise self._error(f"{self._files.name(index)} cannot be read: {reason}") from None
    if image.mode.startswith(("I", "F")):
      raise self._error(f"{self._files.name(index)} has more than 8 bits for a channel")
    return image, label

  def _error(self, accepted: str) -> SettingError:
    return SettingError(self._setting, self._path, accepted)


def open_image_stream(
  path: str | os.PathLike[str],
  setting: str = "path",
  label_of: Mapping[str, int] = MappingProxyType({}),
) -> ImageStream:
  """Opens images to score: an .npz file, a folder of image files, or a .tar file.

  Args:
    path: the file or the folder; see `NpzImages` and `FileImages`.
    setting: name of the setting that holds `path`, for errors.
    label_of: see `FileImages`.

  Raises:
    SettingError: the images cannot be read.
  """
  if has_image_files(path, setting):
    return FileImages(path, setting, label_of)
  return NpzImages(path, setting)


def label_of_named_class(
  held: DataLabels | None, reference: str | os.PathLike[str] | None
) -> dict[str, int]:
  """Returns the labels of named classes of samples: name -> label.

  A class that is a number is left out: the number is its label, as
  `python -m mdt_jax.sample --png` writes it.

  Args:
    held: the labels of a run's data; None without a run.
    reference: the real images, whose labels count without a run.
  """
  found: dict[str, int] = {}
  if held is not None:
    found = held.label_of
  elif reference is not None and has_image_files(reference, "reference"):
    found = FileImages(reference, "reference").label_of
  return {name: i for name, i in found.items() if class_number(name) is None}


def has_image_files(path: str | os.PathLike[str], setting: str = "path") -> bool:
  """Whether a path is a folder or a .tar file, and not a file of arrays.

  Raises:
    SettingError: the path is a folder or a .tar file of a bucket, or the bucket cannot
      be read.
  """
  if not buckets.is_bucket(path):
    path = os.path.expanduser(path)
    return os.path.isdir(path) or os.path.splitext(path)[1] == ".tar"
  found = any_path(setting, path)
  if found.suffix != ".tar" and not found.is_dir():
    return False
  raise SettingError(
    setting,
    str(path),
    "must be an .npz file: image files in a bucket are not read; copy them to a local "
    "disk first (gcloud storage cp -r)",
  )


def has_labels(path: str | os.PathLike[str], setting: str = "path") -> bool:
  """Whether images, or statistics of images, have labels.

  Args:
    path: as for `open_image_stream`; an .npz file may hold statistics only.
    setting: name of the setting that holds `path`, for errors.

  Raises:
    SettingError: the path holds no images, or is no .npz file.
  """
  if has_image_files(path, setting):
    return FileImages(path, setting).has_labels
  found = input_file(setting, path)
  try:
    with open_npz(found) as file:
      return not {LABELS, "labels"}.isdisjoint(npy_format.member_names(file))
  except npy_format.ERRORS as error:
    raise SettingError(
      setting, str(path), f"is not a readable .npz file: {error}"
    ) from None


def _labels_of(
  path: str, classes: Sequence[str], label_of: Mapping[str, int]
) -> np.ndarray | None:
  """The label of each class; None if there is one class without a number.

  A class that `label_of` lacks, while it has others, gets a label that no class has.
  """
  unknown = [name for name in classes if name not in label_of]
  if len(unknown) < len(classes):
    new = dict(zip(unknown, itertools.count(max(label_of.values()) + 1), strict=False))
    if unknown:
      _warn_of_classes(path, unknown, "their images count as classes of their own")
    return np.array([{**label_of, **new}[name] for name in classes], np.int64)
  numbers = [class_number(name) for name in classes]
  if None not in numbers:
    return np.array(numbers, np.int64)
  if len(classes) == 1:
    return None
  if label_of:
    _warn_of_classes(path, unknown, "classes count from 0 in the order of their names")
  return np.arange(len(classes))


def _warn_of_classes(path: str, names: Sequence[str], effect: str) -> None:
  """Warns of classes that the run, or the reference, does not have."""
  logger.warning(
    "%d classes of %s, such as %s, have other names than those of the run or the "
    "reference: %s",
    len(names),
    printable(path),
    printable(names[0]),
    effect,
  )
