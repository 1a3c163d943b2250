"""Labelled files with random access: folders, tar files and TensorFlow Datasets.

Each class implements `Files`: it returns name, label and bytes of file i. The order of
the files is the same in every process.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mdt_jax.buckets import is_bucket
from mdt_jax.data.examples import Example, TolerantSource
from mdt_jax.data.folder_files import FolderFiles
from mdt_jax.data.tar_files import TarFiles, list_tars
from mdt_jax.errors import SettingError, one_line
from mdt_jax.sizes import Size, height_width

_IMAGES = ".bmp .gif .jfif .jpeg .jpg .png .tif .tiff .webp"
IMAGE_EXTENSIONS = tuple(_IMAGES.split())
ARRAY_EXTENSIONS = (".npy",)
TFDS_PREFIX = "tfds:"


class Files(Protocol):
  """Interface of a collection of labelled files.

  Attributes:
    path: path of the collection, as the user typed it.
    classes: names of the classes; a label is an index into this list.
    label_counts: label -> number of files; None if unknown.
  """

  @property
  def path(self) -> str: ...

  @property
  def classes(self) -> Sequence[str]: ...

  @property
  def label_counts(self) -> Mapping[int, int] | None: ...

  def __len__(self) -> int: ...

  def name(self, index: int, /) -> str:
    """Returns the name of a file, used in messages and stored in latent sets."""
    ...

  def read(self, index: int, /) -> tuple[bytes, int]:
    """Returns (bytes, label) of a file; raises if the file is unreadable."""
    ...


class FileSource(TolerantSource):
  """A source that decodes one array per file. Subclasses define `decode`.

  Args:
    files: the files.
    image_size: height and width of a decoded array, see `mdt_jax.sizes`.
    channels: number of channels of a decoded array.
    max_unreadable: largest accepted number of unreadable files.
  """

  def __init__(
    self, files: Files, image_size: Size, channels: int, max_unreadable: int
  ):
    super().__init__(files.path, max_unreadable)
    self.files = files
    self.num_classes = len(files.classes)
    self.class_names = files.classes
    self.label_counts = files.label_counts
    self.image_shape = (*height_width(image_size, "image_size"), channels)

  @abc.abstractmethod
  def decode(self, data: bytes) -> np.ndarray:
    """Decodes a file to an array of `image_shape`; raises if that fails."""

  def __len__(self) -> int:
    return len(self.files)

  def name(self, index: int) -> str:
    return os.path.join(self._path, self.files.name(index))

  def load(self, index: int) -> Example:
    """Reads and decodes file `index`."""
    data, label = self.files.read(index)
    return {"image": self.decode(data), "label": np.int32(label)}


def open_files(
  path: str | os.PathLike[str],
  split: str = "train",
  extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> Files:
  """Opens a folder of files, tar files, or a TFDS data set.

  Args:
    path: a folder of files; a .tar file; a folder of .tar files; or "tfds:NAME", a TFDS
      data set prepared as array_record under TFDS_DATA_DIR.
    split: split of a TFDS data set; other collections ignore it.
    extensions: extensions of the files to read, in lower case; case is ignored. Files
      with other extensions are ignored.

  Raises:
    SettingError: the path does not exist, holds no such file, or has a layout that
      docs/data.md does not describe.
  """
  path = str(path)
  if path.startswith(TFDS_PREFIX):
    return TfdsFiles(path, split)
  if is_bucket(path):
    raise SettingError(
      "config.data.path",
      path,
      "must be a local path: images are not read from a bucket; copy them to a local "
      "disk (gcloud storage cp -r), or mount the bucket",
    )
  path = os.path.expanduser(path)
  tars = list_tars(path)
  if tars:
    return TarFiles(path, tars, extensions)
  return FolderFiles(path, extensions)


class TfdsFiles:
  """An image-classification data set of TFDS, prepared as array_record.

  TFDS does not decode the images, so that `ImageSource` decodes them like image files.
  """

  label_counts = None

  def __init__(self, path: str, split: str):
    try:
      # Slow to import. Reading array_record does not need TensorFlow.
      import tensorflow_datasets as tfds
    except ImportError as error:
      raise SettingError(
        "config.data.path",
        path,
        f"needs TensorFlow Datasets ({one_line(error)}): pip install -e '.[tfds]'",
      ) from None
    self.path = path
    name = path.removeprefix(TFDS_PREFIX)
    try:
      builder: Any = tfds.builder(name)
      self._source = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
      self.classes = builder.info.features["label"].names
    except Exception as error:  # TFDS raises many types, with long texts
      reason = one_line(error)
      raise SettingError(
        "config.data.path",
        path,
        "must be an image-classification data set prepared as array_record "
        f"(tfds build --file_format=array_record) with split {split!r}: {reason}",
      ) from None
    self._name = f"{name}/{split}"

  def __len__(self) -> int:
    return len(self._source)

  def name(self, index: int) -> str:
    return f"{self._name}/{index}"

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns (encoded image, label) of an example."""
    example = self._source[index]
    return example["image"], int(example["label"])
