"""Where encoded images lie: folders, tar files, and TensorFlow Datasets.

Each is a `Files`: names, labels and the bytes of any image, at random. They are
numbered alike by every process.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging

from mdt_jax.errors import SettingError

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
ARRAY_EXTENSIONS = (".npy",)
TFDS_PREFIX = "tfds:"


class Files(Protocol):
  """Labelled images as they are stored.

  Attributes:
    path: the setting that names them.
    classes: the names of the classes.
  """

  path: str
  classes: Sequence[str]

  def __len__(self) -> int: ...

  def name(self, index: int) -> str:
    """Of an image; it is told in messages and kept with latents."""

  def read(self, index: int) -> tuple[bytes, int]:
    """Bytes and label of an image; raises anything where they cannot be read."""


def open_files(
  path: str | os.PathLike[str],
  split: str = "train",
  extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> Files:
  """Opens a folder of images, tar files, or a data set of TFDS.

  Args:
    path: a folder; a .tar file or a folder of them; or "tfds:NAME", a data set
      prepared in array_record form under TFDS_DATA_DIR.
    split: of a data set of TFDS.
    extensions: of the files that count, in any case; others are ignored.

  Raises:
    SettingError: there is nothing to read, or it is not laid out as documented.
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
  """A folder of images, or of other files.

  The classes are the subfolders of `path` in sorted order, with files at any depth
  below them. Without subfolders they are the sorted distinct parts of the file names
  before the first underscore, as ADM names its files (ClassID_ImgID.jpg), or one class
  where no name has an underscore. Names that start with a dot are ignored.
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
  """Images in uncompressed tar files, read in place.

  ImageNet's own layout: one tar file a class (n01440764.tar, …) in a folder, or all of
  them in one tar file (ILSVRC2012_img_train.tar). Any other tar file is taken as the
  folder that it holds.
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
  """An image-classification set of TensorFlow Datasets, in array_record form.

  Its images are left encoded, so that they are read as those of a folder are.
  """

  def __init__(self, path: str, split: str):
    import tensorflow_datasets as tfds  # imports in seconds, needs no TensorFlow here

    self.path = path
    name = path.removeprefix(TFDS_PREFIX)
    try:
      builder = tfds.builder(name)
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


@dataclasses.dataclass(frozen=True, slots=True)  # ImageNet has 1.3 million
class _TarEntry:
  """A file inside a tar file, or inside a tar file in it."""

  tar: str
  name: str
  offset: int
  size: int


def _list_tars(path: str) -> list[str]:
  """The tar file, or those at the top of the folder, that `path` names."""
  if path.endswith(".tar") and os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    return []
  return sorted(str(tar) for tar in Path(path).glob("*.tar"))


def _index_tar(path: str, prefix: str) -> list[_TarEntry]:
  """The files in a tar file, and in tar files in it, put under their names."""
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
) -> tuple[np.ndarray, list[str]]:
  """Returns the label of each file, int32 (N,), and the names of the classes."""
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
    logging.warning(
      "%d of %d classes in %s have no images: %s", len(empty), len(classes), path, shown
    )
  label_of = {name: label for label, name in enumerate(classes)}
  return np.array([label_of[name] for name in class_of], np.int32), classes
