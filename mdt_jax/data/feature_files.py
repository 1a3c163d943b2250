"""Reads stored latents of other tools: folders of .npy, and .npz or .safetensors."""

from __future__ import annotations

import abc
import contextlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdt_jax.data import file_names, npy_format
from mdt_jax.data.file_labels import MAX_CLASSES
from mdt_jax.data.files import ARRAY_EXTENSIONS, Files, open_files
from mdt_jax.data.folder_files import FolderFiles
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger, printable
from mdt_jax.paths import expand_home

# Names of the arrays in a file of many images, in the order of preference.
IMAGE_NAMES = ("latents", "features", "moments", "images", "arr_0", "x")
FLIP_NAMES = ("latents_flip", "features_flip")
LABEL_NAMES = ("labels", "label", "arr_1", "y")


class Rows(abc.ABC):
  """Stored features with random access.

  Attributes:
    shape: shape of the feature of an image, three axes.
    classes: names of the classes.
  """

  shape: tuple[int, ...]
  classes: list[str]

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """Returns the name of an image."""

  @abc.abstractmethod
  def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Returns (feature, feature of the mirror image or None, label)."""


class FolderRows(Rows):
  """Features in .npy files of (C, H, W) or (n, C, H, W), or with channels last.

  Args:
    path: folder of the features.
    labels: folder with a .npy file of n labels under the name of each file of features;
      None: the labels of `files.open_files`.
  """

  def __init__(self, path: str, labels: str | os.PathLike[str] | None):
    self._files: Files
    if labels is None:
      self._files = open_files(path, extensions=ARRAY_EXTENSIONS)
    else:
      self._files = FolderFiles(path, ARRAY_EXTENSIONS)
    try:
      shape = npy_format.read_header(io.BytesIO(self._files.read(0)[0])).shape
    except Exception as error:
      raise refuse(path, f"{self._files.name(0)} cannot be read: {error}") from None
    self._per_file = shape[0] if len(shape) == 4 else 1
    self.shape = shape[-3:]
    if not self._per_file:
      raise refuse(
        path, f"{self._files.name(0)} holds no feature: its shape is {shape}"
      )
    if labels is None:
      self._labels = None
      self.classes = list(self._files.classes)
      if self.classes == [""]:
        warn_of_no_labels(path)
    else:
      self._labels = self._read_labels(expand_home(labels))
      self.classes = [str(i) for i in range(int(self._labels.max()) + 1)]

  def __len__(self) -> int:
    return len(self._files) * self._per_file

  def name(self, index: int) -> str:
    name = self._files.name(index // self._per_file)
    return name if self._per_file == 1 else f"{name}[{index % self._per_file}]"

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    file, row = divmod(index, self._per_file)
    data, label = self._files.read(file)
    found = npy_format.read_npy(data)
    whole = (self._per_file, *self.shape)
    if found.shape != whole and (self._per_file > 1 or found.shape != self.shape):
      expected = whole if self._per_file > 1 else self.shape
      raise ValueError(
        f"{self._files.name(file)} holds shape {found.shape}; expected is {expected}, "
        "as in the first file"
      )
    found = found.reshape(whole)[row]
    return found, None, label if self._labels is None else int(self._labels[index])

  def _read_labels(self, folder: Path) -> np.ndarray:
    """Reads the labels of all images, (N,); raises SettingError if that fails."""
    found = np.empty((len(self._files), self._per_file), np.int32)
    for file in range(len(self._files)):
      name = self._files.name(file)
      with _reading("labels", str(folder)):
        labels = npy_format.read_npy((folder / file_names.to_path(name)).read_bytes())
      check_labels(str(folder), labels, self._per_file, f"{name} ")
      found[file] = labels.reshape(-1)
    return found.reshape(-1)


class ArrayRows(Rows):
  """Features in arrays of many images, in one file or in several .safetensors files.

  Args:
    path: .npy, .npz or .safetensors file, or folder of .safetensors files.
    labels: .npy file of (N,) labels; None: the labels in the files of the features.
  """

  def __init__(self, path: str, labels: str | os.PathLike[str] | None):
    self._path = path
    files = (
      [path]
      if os.path.isfile(path)
      else sorted(str(file) for file in Path(path).glob("*.safetensors"))
    )
    self._parts = [_open_part(path, file) for file in files]
    self.shape = self._parts[0].shape[1:]
    for file, part in zip(files, self._parts, strict=True):
      if len(part.shape) != 4 or part.shape[1:] != self.shape:
        raise refuse(path, f"{Path(file).name} holds features of shape {part.shape}")
    self._ends = np.cumsum([part.shape[0] for part in self._parts])
    if not len(self):
      raise refuse(path, "must hold at least one feature")
    self._labels = self._all_labels(labels)
    self.classes = [str(i) for i in range(int(self._labels.max()) + 1)]

  def __len__(self) -> int:
    return int(self._ends[-1])

  def name(self, index: int) -> str:
    return f"{file_names.from_path(os.path.basename(self._path))}[{index}]"

  def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    number = int(np.searchsorted(self._ends, index, side="right"))
    part = self._parts[number]
    row = index - int(self._ends[number]) + part.shape[0]
    mirror = None if part.read_flip is None else part.read_flip(row)
    return part.read(row), mirror, int(self._labels[index])

  def _all_labels(self, labels: str | os.PathLike[str] | None) -> np.ndarray:
    """The label of each image, (N,)."""
    if labels is not None:
      with _reading("labels", str(labels)):
        found = npy_format.read_npy(expand_home(labels).read_bytes())
    else:
      parts = [part.labels for part in self._parts if part.labels is not None]
      if len(parts) < len(self._parts):
        warn_of_no_labels(self._path)
        return np.zeros(len(self), np.int64)
      found = np.concatenate(list(map(np.ravel, parts)))
    check_labels(self._path if labels is None else str(labels), found, len(self))
    return found.reshape(-1)


class _Part(NamedTuple):
  """Arrays of one file.

  Attributes:
    shape: shape of all features, (N, …).
    read: row -> feature.
    read_flip: row -> feature of the mirror image; None if there is none.
    labels: (N,), or None.
  """

  shape: tuple[int, ...]
  read: Callable[[int], np.ndarray]
  read_flip: Callable[[int], np.ndarray] | None
  labels: np.ndarray | None


def _open_part(path: str, file: str) -> _Part:
  """Opens a file of arrays; raises SettingError if that fails."""
  with _reading("features", path):
    if file.endswith(".npy"):
      with open(file, "rb") as opened:
        npy_format.read_header(opened)
      array = np.load(file, mmap_mode="r", allow_pickle=False)
      array = npy_format.with_bfloat16(array)
      return _Part(array.shape, array.__getitem__, None, None)
    if file.endswith(".npz"):
      return _open_npz(path, file)
    if file.endswith(".safetensors"):
      return _open_safetensors(path, file)
  raise refuse(path, "must be a folder, or an .npy, .npz or .safetensors file")


def _open_npz(path: str, file: str) -> _Part:
  with zipfile.ZipFile(file) as archive:
    names = npy_format.member_names(archive)
    images, flip, labels = _names_in(path, names)

    def read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
      return npy_format.with_bfloat16(npy_format.read_member(archive, name))

    array = read(archive, images)
    mirror = None if flip is None else read(archive, flip)
    return _Part(
      array.shape,
      array.__getitem__,
      None if mirror is None else mirror.__getitem__,
      None if labels is None else read(archive, labels),
    )


def _open_safetensors(path: str, file: str) -> _Part:
  from safetensors import safe_open

  opened: Any = safe_open(file, "numpy")
  images, flip, labels = _names_in(path, list(opened.keys()))

  def reader(name: str) -> Callable[[int], np.ndarray]:
    piece = opened.get_slice(name)
    return lambda row: piece[row : row + 1][0]

  return _Part(
    tuple(opened.get_slice(images).get_shape()),
    reader(images),
    None if flip is None else reader(flip),
    None if labels is None else opened.get_tensor(labels),
  )


def _names_in(path: str, names: list[str]) -> tuple[str, str | None, str | None]:
  """Returns the names of the arrays of features, of mirror images and of labels."""

  def first(known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)

  images = first(IMAGE_NAMES)
  if images is None and len(names) == 1:
    images = names[0]
  if images is None:
    raise refuse(
      path,
      f"must hold an array {', '.join(IMAGE_NAMES)}; holds {', '.join(names[:9])}",
    )
  return images, first(FLIP_NAMES), first(LABEL_NAMES)


def check_labels(path: str, labels: np.ndarray, count: int, name: str = "") -> None:
  """Raises SettingError unless `labels` are `count` numbers in [0, MAX_CLASSES).

  Args:
    path: path of the labels, as the user typed it.
    labels: the labels.
    count: number of labels.
    name: what holds the labels, for the error.
  """
  if labels.dtype.kind not in "iu" or labels.size != count:
    raise SettingError(
      "labels",
      path,
      f"{name}must hold {count} whole numbers, one for each feature; holds "
      f"{labels.dtype} of shape {labels.shape}",
    )
  if labels.min() < 0 or labels.max() >= MAX_CLASSES:
    raise SettingError(
      "labels", path, f"{name}must hold whole numbers in [0, {MAX_CLASSES:,})"
    )


def warn_of_no_labels(path: str) -> None:
  """Warns that all images get the label 0."""
  logger.warning("All images of %s get the label 0: no labels found", printable(path))


@contextlib.contextmanager
def _reading(setting: str, path: str) -> Iterator[None]:
  """Turns errors in reading a file into a SettingError of one line."""
  try:
    yield
  except SettingError:
    raise
  except Exception as error:  # the errors of safetensors have no base class
    reason = one_line(error)
    raise SettingError(setting, path, f"cannot be read: {reason}") from None


def refuse(path: str, accepted: str) -> SettingError:
  """Returns a SettingError of the setting "features"."""
  return SettingError("features", path, accepted)
