"""Labelled files at random access: folders, tar files, and TensorFlow Datasets.

Each of them is a `Files`, and gives the name, label and bytes of file i. Every process
numbers the files alike.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from mdt_jax.data.examples import Example, TolerantSource
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
ARRAY_EXTENSIONS = (".npy",)
TFDS_PREFIX = "tfds:"


class Files(Protocol):
  """Labelled files of images or arrays.

  Attributes:
    path: of the files, as the user typed it.
    classes: the names of the classes; a label is an index into them.
  """

  @property
  def path(self) -> str: ...

  @property
  def classes(self) -> Sequence[str]: ...

  def __len__(self) -> int: ...

  def name(self, index: int, /) -> str:
    """Returns the name of a file; messages show it, and latent sets store it."""
    ...

  def read(self, index: int, /) -> tuple[bytes, int]:
    """Returns bytes and label of a file; raises any exception if unreadable."""
    ...


class FileSource(TolerantSource):
  """A source that decodes one array from each file.

  Subclasses define `decode`.

  Args:
    files: the files.
    image_size: height and width of a decoded array.
    channels: of a decoded array.
    max_unreadable: how many files may be unreadable.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    super().__init__(files.path, max_unreadable)
    self.files = files
    self.num_classes = len(files.classes)
    self.image_shape = (image_size, image_size, channels)

  @abc.abstractmethod
  def decode(self, data: bytes) -> np.ndarray:
    """Decodes the bytes of a file to an array of `image_shape`, or raises."""

  def __len__(self) -> int:
    return len(self.files)

  def name(self, index: int) -> str:
    return os.path.join(self._path, self.files.name(index))

  def load(self, index: int) -> Example:
    data, label = self.files.read(index)
    return {"image": self.decode(data), "label": np.int32(label)}


def open_files(
  path: str | os.PathLike[str],
  split: str = "train",
  extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> Files:
  """Opens a folder of files, tar files, or a TFDS data set.

  Args:
    path: a folder; a .tar file or a folder of them; or "tfds:NAME", a data set
      prepared as array_record under TFDS_DATA_DIR.
    split: of a TFDS data set.
    extensions: of the files to read, in any case; other files are ignored.

  Raises:
    SettingError: there is no such path, no file in it, or its layout is none of those
      in docs/data.md.
  """
  path = str(path)
  if path.startswith(TFDS_PREFIX):
    return TfdsFiles(path, split)
  path = os.path.expanduser(path)
  tars = _list_tars(path)
  if tars:
    return TarFiles(path, tars, extensions)
  return FolderFiles(path, extensions)


class FolderFiles:
  """Files in a folder.

  The classes are the subfolders of `path` in sorted order, with files at any depth
  below them. In a folder without subfolders, the class of a file is its name up to the
  first underscore, as ADM names its files (ClassID_ImgID.jpg); if no name has an
  underscore, there is one class. Names that start with a dot are ignored.
  """

  def __init__(self, path: str, extensions: tuple[str, ...] = IMAGE_EXTENSIONS):
    self.path = path
    self._names, subfolders = _list_folder(path, extensions)
    self._labels, self.classes = _label_files(path, self._names, subfolders)

  def __len__(self) -> int:
    return len(self._names)

  def name(self, index: int) -> str:
    return self._names[index]

  def read(self, index: int) -> tuple[bytes, int]:
    data = Path(self.path, self._names[index]).read_bytes()
    return data, int(self._labels[index])


class TarFiles:
  """Files in uncompressed tar files, read in place.

  Reads ImageNet's own layout: a tar file for each class (n01440764.tar, …) in a folder,
  or all of these in one tar file (ILSVRC2012_img_train.tar). Any other tar file is read
  like the folder that it holds.
  """

  def __init__(self, path: str, tars: list[str], extensions: tuple[str, ...]):
    self.path = path
    entries = []
    for tar in tars:
      prefix = "" if tar == path else f"{Path(tar).stem}/"
      entries += [
        entry
        for entry in _index_tar(tar, prefix)
        if entry.name.lower().endswith(extensions)
      ]
    if not entries:
      raise SettingError(
        "config.data.path", path, f"expected {' '.join(extensions)} in it, found none"
      )
    self._entries = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name for entry in self._entries]
    if all(name.count("/") > 1 for name in names):  # one folder holds the classes
      names = [name.split("/", 1)[1] for name in names]
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    self._labels, self.classes = _label_files(path, names, folders)

  def __len__(self) -> int:
    return len(self._entries)

  def name(self, index: int) -> str:
    return self._entries[index].name

  def read(self, index: int) -> tuple[bytes, int]:
    entry = self._entries[index]
    with open(entry.tar, "rb") as file:
      file.seek(entry.offset)
      data = file.read(entry.size)
    if len(data) < entry.size:
      raise OSError(f"{entry.tar} ends within {entry.name}")
    return data, int(self._labels[index])


class TfdsFiles:
  """An image-classification set of TensorFlow Datasets, prepared as array_record.

  The images stay encoded, so that they are decoded like those of a folder.
  """

  def __init__(self, path: str, split: str):
    # Takes seconds to import. Reading array_record needs no TensorFlow.
    import tensorflow_datasets as tfds

    self.path = path
    name = path.removeprefix(TFDS_PREFIX)
    try:
      builder: Any = tfds.builder(name)
      self._source = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
      self.classes = builder.info.features["label"].names
    except Exception as error:  # TFDS raises many kinds, with pages of text
      reason = (str(error) or type(error).__name__).strip().splitlines()[0]
      raise SettingError(
        "config.data.path",
        path,
        "expected an image-classification set prepared as array_record "
        f"(tfds build --file_format=array_record), split {split!r}: {reason}",
      ) from None
    self._name = f"{name}/{split}"

  def __len__(self) -> int:
    return len(self._source)

  def name(self, index: int) -> str:
    return f"{self._name}/{index}"

  def read(self, index: int) -> tuple[bytes, int]:
    example = self._source[index]
    return example["image"], int(example["label"])


@dataclasses.dataclass(frozen=True, slots=True)  # slots: ImageNet has 1.3 million
class _TarEntry:
  """A file inside a tar file, or inside a tar file that the tar file holds."""

  tar: str
  name: str
  offset: int
  size: int


def _list_tars(path: str) -> list[str]:
  """Lists `path` itself if it is a tar file, or the tar files in the folder `path`."""
  if path.endswith(".tar") and os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    return []
  return sorted(str(tar) for tar in Path(path).glob("*.tar"))


def _index_tar(path: str, prefix: str) -> list[_TarEntry]:
  """Lists the files in a tar file; those of an inner tar file get its name in front."""
  entries = []
  try:
    with tarfile.open(path, "r:") as outer:
      for member in outer:
        if member.isfile() and member.name.endswith(".tar"):
          folder = f"{prefix}{Path(member.name).stem}/"
          with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
            entries += [
              dataclasses.replace(entry, offset=entry.offset + member.offset_data)
              for entry in _tar_entries(path, folder, inner)
            ]
        else:
          entries += _tar_entries(path, prefix, [member])
  except (tarfile.TarError, OSError) as error:
    raise SettingError(
      "config.data.path", path, f"expected an uncompressed tar file: {error}"
    ) from None
  return entries


def _tar_entries(
  path: str, prefix: str, members: Iterable[tarfile.TarInfo]
) -> list[_TarEntry]:
  return [
    _TarEntry(path, prefix + name, member.offset_data, member.size)
    for member in members
    if member.isfile()
    and (name := member.name.removeprefix("./"))
    and not Path(name).name.startswith(".")
  ]


def _list_folder(path: str, extensions: tuple[str, ...]) -> tuple[list[str], list[str]]:
  """Returns the data files below a folder, relative to it, and its subfolders.

  Both are sorted, so that every process numbers the files alike.
  """
  if not os.path.exists(path):
    raise SettingError(
      "config.data.path", path, "expected a folder; there is none of this name"
    )
  if not os.path.isdir(path):
    raise SettingError("config.data.path", path, "expected a folder, this is a file")

  def fail(error: OSError):  # By default os.walk skips such a folder silently.
    raise SettingError(
      "config.data.path",
      path,
      f"expected readable folders; {error.filename}: {error.strerror}",
    ) from error

  files: list[str] = []
  classes: list[str] = []
  for folder, subfolders, names in os.walk(path, onerror=fail, followlinks=True):
    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    prefix = os.path.relpath(folder, path)
    if prefix == os.curdir:
      prefix, classes = "", sorted(subfolders)
    files += [
      Path(prefix, name).as_posix()
      for name in names
      if not name.startswith(".") and name.lower().endswith(extensions)
    ]
  if not files:
    raise SettingError(
      "config.data.path", path, f"expected {' '.join(extensions)} files, found none"
    )
  return sorted(files), classes


def _label_files(
  path: str, files: list[str], subfolders: list[str]
) -> tuple[Int32[np.ndarray, " N"], list[str]]:
  """Returns the label of each file, and the names of the classes."""
  flat = [name for name in files if "/" not in name]
  if not flat:
    class_of, classes = [name.split("/")[0] for name in files], subfolders
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
  empty = sorted(set(classes) - set(class_of))
  if empty:
    shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
    logger.warning(
      "%d of %d classes in %s have no images: %s", len(empty), len(classes), path, shown
    )
  label_of = {name: label for label, name in enumerate(classes)}
  return np.array([label_of[name] for name in class_of], np.int32), classes
