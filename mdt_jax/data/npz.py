"""A source of images and labels in one .npz file, or in .npy files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.data import npy_format
from mdt_jax.data.examples import (
  Example,
  SourceArguments,
  TolerantSource,
  count_labels,
  shape_error,
)
from mdt_jax.data.memory import check_images, check_labels
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger
from mdt_jax.sizes import height_width

EXTENSIONS = (".npz", ".npy")
# Accepted names of images and labels in an .npz file; np.savez uses arr_0 and arr_1.
NAMES = (("arr_0", "arr_1"), ("images", "labels"), ("x", "y"))
# ADM's reference batches hold these arrays in addition to the images.
STATISTICS = {"mu", "sigma", "mu_s", "sigma_s"}


class NpzSource(TolerantSource):
  """A source of images and labels from one file, or from a pair of files.

  The entry "image" of an example is uint8 (H, W, C) if `pixels` is set. Otherwise
  "image" is float32 (H, W, C), finite, and neither scaled nor flipped. A float image
  that is not finite counts as unreadable.

  Args:
    path: IMAGES.npz, IMAGES.npy, or "IMAGES.npy,LABELS.npy"; see `read_arrays`.
    image_shape: (H, W, C) of the images.
    pixels: True: the images must be uint8. False: they must be floats.
    max_unreadable: largest accepted number of unreadable images.

  Raises:
    SettingError: the file cannot be read, or its arrays have the wrong shape or dtype.
  """

  def __init__(
    self,
    path: str,
    image_shape: tuple[int, int, int],
    pixels: bool,
    max_unreadable: int,
  ):
    super().__init__(path, max_unreadable)
    self.image_shape = image_shape
    images, labels = read_arrays(path)
    try:
      self._images = check_images(images)
      self._labels = check_labels(labels, len(images))
    except SettingError as error:
      raise _error(path, str(error)) from None
    if (images.dtype == np.uint8) != pixels:
      accepted = "uint8 pixels" if pixels else "floats"
      other = "arrays" if pixels else "npz"
      raise _error(
        path,
        f"must hold {accepted}, holds {images.dtype}; use config.data.source={other} "
        "for this file",
      )
    if images.shape[1:] != image_shape:
      raise shape_error(path, images.shape[1:], image_shape)
    self.num_classes = int(self._labels.max()) + 1
    self.label_counts = count_labels(self._labels)

  def __len__(self) -> int:
    return len(self._labels)

  def name(self, index: int) -> str:
    return f"{self._path}[{index}]"

  def load(self, index: int) -> Example:
    """Reads image and label; raises ValueError if a float image is not finite."""
    image = np.array(self._images[index])  # copies; reads from disk if memory-mapped
    if image.dtype != np.uint8:
      with np.errstate(over="ignore"):
        image = image.astype(np.float32)
      if not np.isfinite(image).all():
        raise ValueError("must be finite")
    return {"image": image, "label": self._labels[index]}

  def __getstate__(self) -> dict[str, Any]:
    """Drops the images; a worker process opens the file again."""
    state = super().__getstate__()
    del state["_images"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)
    self._images, _ = read_arrays(self._path)


def is_array_file(path: str) -> bool:
  """Returns whether `path` is one of `read_arrays`: an .npz or .npy file, or a pair."""
  return path.lower().endswith(EXTENSIONS) and not os.path.isdir(
    os.path.expanduser(path)
  )


def open_npz(arguments: SourceArguments) -> NpzSource:
  """Opens a file of uint8 images; see `NpzSource`."""
  return open_array_file(arguments, pixels=True)


def open_array_file(arguments: SourceArguments, pixels: bool) -> NpzSource:
  """Opens a file of uint8 images (`pixels`) or of floats; see `NpzSource`."""
  height, width = height_width(arguments.image_size, "image_size")
  shape = (height, width, arguments.channels)
  return NpzSource(arguments.path, shape, pixels, arguments.max_unreadable)


def read_arrays(path: str) -> tuple[np.ndarray, np.ndarray | None]:
  """Opens images and labels.

  Args:
    path: one of
      IMAGES.npz with arrays named as in NAMES; the arrays are read into memory;
      IMAGES.npy with labels in IMAGES_labels.npy or labels.npy in the same folder;
      "IMAGES.npy,LABELS.npy".

  Returns:
    (images, labels). Arrays of .npy files are memory-mapped. labels is None, after a
    warning, if there are no labels.

  Raises:
    SettingError: setting "config.data.path": a file or an array is missing, or a file
      cannot be read.
  """
  first, comma, second = os.path.expanduser(path).rpartition(",")
  if comma and not os.path.exists(os.path.expanduser(path)):
    if not (first.lower().endswith(".npy") and second.lower().endswith(".npy")):
      raise _error(path, "must be of the form IMAGES.npy,LABELS.npy")
    return _read_npy(path, first), _read_npy(path, os.path.expanduser(second))
  name = os.path.expanduser(path)
  if name.lower().endswith(".npz"):
    return _read_npz(path, name)
  if not name.lower().endswith(".npy"):
    raise _error(path, "must be an .npz or .npy file")
  images = _read_npy(path, name)
  beside = [Path(name).with_name(f"{Path(name).stem}_labels.npy")]
  beside.append(Path(name).with_name("labels.npy"))
  for labels in beside:
    if labels.exists():
      return images, _read_npy(path, str(labels))
  _warn(path, f"its folder holds no {beside[0].name} or {beside[1].name}")
  return images, None


def _read_npy(path: str, name: str) -> np.ndarray:
  """Memory-maps the .npy file `name`; errors show `path`, as the user typed it."""
  with _reading(path, name):
    if zipfile.is_zipfile(name):
      raise _error(path, f"must be an .npy file; {name} is an .npz file")
    with open(name, "rb") as file:
      header = npy_format.read_header(file)
    if header.num_bytes > os.path.getsize(name):
      raise ValueError(f"its shape is {header.shape}, for which it is too short")
    return np.load(name, mmap_mode="r", allow_pickle=False)


def _read_npz(path: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
  """Reads the .npz file `name`; errors show `path`, as the user typed it."""
  with _reading(path, name), zipfile.ZipFile(name) as archive:
    found = npy_format.member_names(archive)
    held = ", ".join(found) or "none"
    for images, labels in NAMES:
      if images not in found:
        continue
      if labels in found:
        both = [npy_format.read_member(archive, array) for array in (labels, images)]
        return both[1], both[0]
      only_images = not set(found) - STATISTICS - {images}
      if only_images:
        _warn(path, f"the file holds no array {labels}")
        return npy_format.read_member(archive, images), None
      raise _error(path, f"must hold an array {labels} of labels; holds only {held}")
  accepted = ", or ".join(f"{images} and {labels}" for images, labels in NAMES)
  raise _error(path, f"must hold arrays {accepted}; holds only {held}")


@contextmanager
def _reading(path: str, name: str) -> Iterator[None]:
  """Turns errors in reading the file `name` into a SettingError of one line."""
  if not os.path.exists(name):
    raise _error(path, f"must be a file; {name} does not exist")
  if os.path.isdir(name):
    raise _error(path, f"must be a file; {name} is a folder")
  try:
    yield
  except SettingError:
    raise
  except npy_format.ERRORS as error:
    reason = one_line(error)
    raise _error(path, f"{name} cannot be read: {reason}") from None


def _warn(path: str, reason: str) -> None:
  """Warns that all images of a file get the label 0."""
  logger.warning("All images of %s get the label 0: %s", path, reason)


def _error(path: str, accepted: str) -> SettingError:
  """Returns a SettingError of the setting "config.data.path"."""
  return SettingError("config.data.path", path, accepted)
