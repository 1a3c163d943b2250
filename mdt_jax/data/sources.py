"""Examples with random access: images or latents, and their labels.

A source has `__len__`, `__getitem__(i)` and the attributes `num_classes` and
`image_shape` (H, W, C). An example holds "label", an int32 scalar in [0, num_classes),
and either "image", uint8 in [0, 255], or float32 where it is a latent that is used as
it stands; or "moments", see `latents.LatentSource`.
"""

from __future__ import annotations

import abc
import io
import os
import threading
from typing import Any, Protocol

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from mdt_jax.data import transforms
from mdt_jax.data.files import ARRAY_EXTENSIONS, Files, open_files
from mdt_jax.errors import SettingError, check_choice

SOURCES = ("digits", "images", "latents", "arrays")
PATHS = {
  "images": "a folder of images, .tar files or tfds:NAME",
  "latents": "an output of python -m mdt_jax.encode",
  "arrays": "a folder of .npy files",
}


class Source(Protocol):
  """Labelled examples with random access, as `loader.create_loader` takes them."""

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


class TolerantSource(abc.ABC):
  """Examples of which some may be unreadable.

  One that cannot be read is logged once and left out: the next readable one stands in
  its place, on every process alike, so that batches keep their size. Reading is
  thread-safe. Subclasses give `__len__`, `load(index)` and `name(index)`.

  Args:
    path: the setting that names the data.
    max_unreadable: how many examples may be unreadable.

  Raises:
    SettingError: in `__getitem__`, where more than `max_unreadable` examples, or all
      of them, cannot be read.
  """

  def __init__(self, path: str, max_unreadable: int):
    self._path = path
    self._max_unreadable = max_unreadable
    self._unreadable: set[int] = set()
    self._lock = threading.Lock()

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def load(self, index: int) -> dict[str, np.ndarray]:
    """Example `index` itself; raises anything where it cannot be read."""

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """Of an example, for messages."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of a source of {len(self)}")
    for offset in range(len(self)):
      candidate = (index + offset) % len(self)
      if candidate in self._unreadable:
        continue
      try:
        return self.load(candidate)
      except Exception as error:  # Pillow's decoders raise nearly every type.
        self.leave_out(candidate, error)
    raise SettingError(
      "config.data.path",
      self._path,
      f"expected readable files, but none of the {len(self)} there can be read",
    )

  def leave_out(self, index: int, error: Exception) -> None:
    """Counts and logs an unreadable example; raises where there are too many."""
    reason = f"{type(error).__name__}: {error}"
    name = self.name(index)
    with self._lock:
      if index in self._unreadable:
        return  # Another thread met it in the meantime.
      self._unreadable.add(index)
      count = len(self._unreadable)
    logging.warning("Left out %s, which cannot be read (%s)", name, reason)
    if count > self._max_unreadable:
      raise SettingError(
        "config.data.max_unreadable",
        self._max_unreadable,
        f"{count} files cannot be read, the last is {name} ({reason}); "
        "mend or remove them, or set a higher number",
      ) from error

  def __getstate__(self) -> dict[str, Any]:
    """For worker processes, to which a lock cannot be sent."""
    return {name: value for name, value in vars(self).items() if name != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _lock=threading.Lock())


class ImageSource(TolerantSource):
  """Images, cropped as ADM does.

  "image" is uint8 (image_size, image_size, channels), converted to grey or RGB and
  centre-cropped; of an animation the first frame.

  Args:
    files: where the images lie.
    image_size: the side of an image in pixels.
    channels: 1 or 3.
    max_unreadable: how many images may be unreadable.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    super().__init__(files.path, max_unreadable)
    check_choice("config.model.in_channels", channels, (1, 3))
    self.files = files
    self.num_classes = len(files.classes)
    self.image_shape = (image_size, image_size, channels)

  def __len__(self) -> int:
    return len(self.files)

  def name(self, index: int) -> str:
    return os.path.join(self._path, self.files.name(index))

  def load(self, index: int) -> dict[str, np.ndarray]:
    data, label = self.files.read(index)
    return {"image": self._decode(data), "label": np.int32(label)}

  def _decode(self, data: bytes) -> np.ndarray:
    size, _, channels = self.image_shape
    try:
      opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its own message names an object in memory
      raise UnidentifiedImageError("no image of a known kind") from None
    with opened as image:
      image.load()  # Image.open reads the header only; this finds truncated files.
      if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 8.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
      image = image.convert("L" if channels == 1 else "RGB")
    smaller, larger = sorted(image.size)
    if larger * size**2 / smaller > Image.MAX_IMAGE_PIXELS:
      raise ValueError(f"{image.size} pixels are too long and narrow to be cropped")
    cropped = np.array(transforms.center_crop(image, size))
    return cropped.reshape(self.image_shape)


class ArraySource(ImageSource):
  """Arrays (image_size, image_size, channels) in .npy files, used as they stand.

  "image" is float32, such as a latent that is already scaled.

  Raises:
    SettingError: the first array has another shape.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    TolerantSource.__init__(self, files.path, max_unreadable)
    self.files = files
    self.num_classes = len(files.classes)
    self.image_shape = (image_size, image_size, channels)
    try:
      found = np.load(io.BytesIO(files.read(0)[0]), allow_pickle=False).shape
    except Exception:  # an unreadable one is met, and told, later
      return
    if found != self.image_shape:
      raise shape_error(self._path, found, self.image_shape)

  def _decode(self, data: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.shape != self.image_shape or array.dtype.kind != "f":
      raise ValueError(
        f"expected floats of shape {self.image_shape}, found {array.dtype} of shape "
        f"{array.shape}"
      )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError("expected finite numbers")  # One NaN would end a training run.
    return array


class Subset:
  """Some examples of a source."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.num_classes, self.image_shape = source.num_classes, source.image_shape

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return self._source[int(self._indices[index])]


def split_indices(length: int, share: float) -> tuple[np.ndarray, np.ndarray]:
  """Indices for training, and those for validation: `share` of them, evenly spread."""
  count = round(length * share)
  held_out = np.linspace(0, length - 1, count).round().astype(int)
  return np.setdiff1d(np.arange(length), held_out), held_out


def create_source(
  name: str,
  *,
  path: str | os.PathLike[str] | None,
  split: str = "train",
  image_size: int,
  channels: int,
  max_unreadable: int,
) -> Source:
  """Returns the source that `config.data.source` names.

  Args:
    name: one of SOURCES.
    path: of the images, see `files.open_files`, or of a latent set; unused for digits.
    split: of a data set of TFDS.
    image_size: the model's input size; 8 for digits.
    channels: the model's input channels; 1 for digits.
    max_unreadable: how many examples may be unreadable.

  Raises:
    SettingError: for another name, without a path, for a size or number of channels
      that the source does not have, and where the sources do.
  """
  check_choice("config.data.source", name, SOURCES)
  if name in PATHS and not path:
    raise SettingError("config.data.path", path, f"must be given: {PATHS[name]}")
  if name == "images":
    files = open_files(path, split)
    return ImageSource(files, image_size, channels, max_unreadable)
  if name == "arrays":
    files = open_files(path, split, ARRAY_EXTENSIONS)
    return ArraySource(files, image_size, channels, max_unreadable)
  if name == "latents":
    from mdt_jax.data.latents import LatentSource

    return LatentSource(path, image_size, channels, max_unreadable)
  if image_size != 8:
    raise SettingError(
      "config.model.input_size", image_size, "accepted is 8 for digits"
    )
  if channels != 1:
    raise SettingError("config.model.in_channels", channels, "accepted is 1 for digits")
  return DigitsSource()


def shape_error(
  path: str, found: tuple[int, ...], expected: tuple[int, int, int]
) -> SettingError:
  """Data of another shape than the network takes: told before anything is compiled."""
  return SettingError(
    "config.data.path",
    path,
    f"holds arrays of shape {found}, where config.model.input_size and in_channels "
    f"make it {expected}",
  )
