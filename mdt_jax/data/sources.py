"""Where images come from: sources with a length and random access.

A source has `__len__`, `__getitem__(i) -> {"image", "label"}` and the attributes
`num_classes` and `image_shape` (H, W, C). "image" is uint8 in [0, 255], or float32
where it is a latent that is used as it stands; "label" is an int32 scalar in
[0, num_classes).
"""

from __future__ import annotations

import os
import threading
from typing import Protocol

import numpy as np
from absl import logging
from PIL import Image

from mdt_jax.data import transforms
from mdt_jax.errors import SettingError, check_choice

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
ARRAY_EXTENSION = ".npy"


class Source(Protocol):
  """Labelled images with random access, as `loader.create_loader` takes them."""

  num_classes: int
  image_shape: tuple[int, int, int]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class DigitsSource:
  """The 1,797 handwritten digits of scikit-learn, 8x8x1, in 10 classes.

  "image" is uint8 (8, 8, 1): the 17 grey levels 0 … 16 spread over 0 … 255.
  """

  num_classes = 10
  image_shape = (8, 8, 1)

  def __init__(self):
    from sklearn.datasets import load_digits  # Slow to import, and only used here.

    digits = load_digits()
    self._images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    self._labels = digits.target.astype(np.int32)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {"image": self._images[index], "label": self._labels[index]}


class FolderSource:
  """A folder of images, or of latents as .npy files.

  The classes are the subfolders of `path` in sorted order, with files at any depth
  below them. Without subfolders they are the sorted distinct parts of the file names
  before the first underscore, as ADM names its files (ClassID_ImgID.jpg), or one class
  where no name has an underscore. Names that start with a dot are ignored.

  "image" is uint8 (image_size, image_size, channels), converted to grey or RGB and
  centre-cropped; a .npy file has that shape already and is taken as float32 unchanged.

  A file that cannot be read is logged once and left out: the next readable one stands
  in its place, on every process alike, so that batches keep their size. Reading is
  thread-safe.

  Args:
    path: the folder.
    image_size: the side of an image in pixels, or of a latent in its own cells.
    channels: 1 or 3 for images, any number for .npy files.
    max_unreadable: how many files may be unreadable.

  Raises:
    SettingError: here, where the folder is missing, empty or not laid out as above, or
      where `channels` does not fit; in `__getitem__`, where more than `max_unreadable`
      files, or all of them, cannot be read.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    image_size: int,
    channels: int,
    max_unreadable: int,
  ):
    self._path = str(path or "")
    files, subfolders = _list_folder(self._path)
    self._is_array = _holds_arrays(self._path, files)
    if not self._is_array and channels not in (1, 3):
      raise SettingError(
        "config.model.in_channels",
        channels,
        "accepted are 1 and 3 for a folder of images (.npy files may have any number)",
      )
    self._files = files
    self._labels, self.num_classes = _label_files(self._path, files, subfolders)
    self.image_shape = (image_size, image_size, channels)
    self._max_unreadable = max_unreadable
    self._unreadable: set[int] = set()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of a source of {len(self)}")
    for offset in range(len(self)):
      candidate = (index + offset) % len(self)
      if candidate in self._unreadable:
        continue
      try:
        image = self._read(os.path.join(self._path, self._files[candidate]))
      except Exception as error:  # Pillow's decoders raise nearly every type.
        self._leave_out(candidate, error)
      else:
        return {"image": image, "label": self._labels[candidate]}
    raise SettingError(
      "config.data.path",
      self._path,
      f"expected readable files, but none of the {len(self)} there can be read",
    )

  def _read(self, path: str) -> np.ndarray:
    if self._is_array:
      return _read_array(path, self.image_shape)
    size, _, channels = self.image_shape
    with Image.open(path) as image:
      image.load()  # Image.open reads the header only; this finds truncated files.
      image = image.convert("L" if channels == 1 else "RGB")
    return np.array(transforms.center_crop(image, size)).reshape(self.image_shape)

  def _leave_out(self, index: int, error: Exception) -> None:
    """Counts and logs an unreadable file; raises where there are too many."""
    path = os.path.join(self._path, self._files[index])
    reason = f"{type(error).__name__}: {error}"
    with self._lock:
      if index in self._unreadable:
        return  # Another thread met it in the meantime.
      self._unreadable.add(index)
      count = len(self._unreadable)
    logging.warning("Left out %s, which cannot be read (%s)", path, reason)
    if count > self._max_unreadable:
      raise SettingError(
        "config.data.max_unreadable",
        self._max_unreadable,
        f"{count} files cannot be read, the last is {path} ({reason}); "
        "mend or remove them, or set a higher number",
      ) from error


def create_source(
  name: str,
  *,
  path: str | os.PathLike[str] | None,
  image_size: int,
  channels: int,
  max_unreadable: int,
) -> Source:
  """Returns the source that `config.data.source` names.

  Args:
    name: "digits" or "folder".
    path: the folder of a FolderSource; unused for digits.
    image_size: the model's input size; 8 for digits.
    channels: the model's input channels; 1 for digits.
    max_unreadable: how many files of a FolderSource may be unreadable.

  Raises:
    SettingError: for another name, for a size or number of channels that the source
      does not have, and where FolderSource does.
  """
  check_choice("config.data.source", name, ("digits", "folder"))
  if name == "folder":
    return FolderSource(path, image_size, channels, max_unreadable)
  if image_size != 8:
    raise SettingError(
      "config.model.input_size", image_size, "accepted is 8 for digits"
    )
  if channels != 1:
    raise SettingError("config.model.in_channels", channels, "accepted is 1 for digits")
  return DigitsSource()


def _list_folder(path: str) -> tuple[list[str], list[str]]:
  """Returns the data files below a folder, relative to it, and its subfolders.

  Both are sorted, so that every process numbers them alike.
  """
  if not os.path.exists(path):
    raise SettingError(
      "config.data.path", path, "expected a folder; there is none of this name"
    )
  if not os.path.isdir(path):
    raise SettingError("config.data.path", path, "expected a folder, this is a file")

  def fail(error: OSError):  # os.walk would leave such a folder out in silence.
    raise SettingError(
      "config.data.path",
      path,
      f"expected readable folders; {error.filename}: {error.strerror}",
    ) from error

  files = []
  for folder, subfolders, names in os.walk(path, onerror=fail, followlinks=True):
    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    prefix = os.path.relpath(folder, path)
    if prefix == os.curdir:
      prefix, classes = "", sorted(subfolders)
    files += [
      os.path.join(prefix, name)
      for name in names
      if not name.startswith(".")
      and name.lower().endswith((*IMAGE_EXTENSIONS, ARRAY_EXTENSION))
    ]
  if not files:
    extensions = " ".join(IMAGE_EXTENSIONS)
    raise SettingError(
      "config.data.path",
      path,
      f"expected images ({extensions}) or {ARRAY_EXTENSION} files, found none",
    )
  return sorted(files), classes


def _holds_arrays(path: str, files: list[str]) -> bool:
  """Tells a folder of .npy files from one of images; raises where it holds both."""
  arrays = [name for name in files if name.lower().endswith(ARRAY_EXTENSION)]
  if arrays and len(arrays) < len(files):
    raise SettingError(
      "config.data.path",
      path,
      f"expected images or {ARRAY_EXTENSION} files, found "
      f"{len(files) - len(arrays)} images and {len(arrays)} {ARRAY_EXTENSION} files",
    )
  return bool(arrays)


def _label_files(
  path: str, files: list[str], subfolders: list[str]
) -> tuple[np.ndarray, int]:
  """Returns the label of each file, int32 (N,), and the number of classes."""
  flat = [name for name in files if os.sep not in name]
  if not flat:
    class_of, classes = [name.split(os.sep)[0] for name in files], subfolders
  elif len(flat) < len(files):
    raise SettingError(
      "config.data.path",
      path,
      "expected a subfolder for each class or a flat folder, found both: "
      f"{len(flat)} files at the top and {len(files) - len(flat)} in subfolders",
    )
  else:
    bare = [name for name in files if "_" not in name]
    if bare and len(bare) < len(files):
      raise SettingError(
        "config.data.path",
        path,
        "expected all names as ClassID_ImgID or none with an underscore; "
        f"{len(bare)} of {len(files)} have none, such as {bare[0]}",
      )
    class_of = [name.split("_")[0] if not bare else "" for name in files]
    classes = sorted(set(class_of))
  label_of = {name: label for label, name in enumerate(classes)}
  return np.array([label_of[name] for name in class_of], np.int32), len(classes)


def _read_array(path: str, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads a latent as float32; raises ValueError where it is not one of `shape`."""
  array = np.load(path, allow_pickle=False)
  if array.shape != shape or array.dtype.kind != "f":
    raise ValueError(
      f"expected floats of shape {shape}, found {array.dtype} of shape {array.shape}"
    )
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise ValueError("expected finite numbers")  # One NaN would end a training run.
  return array
