"""Labelled files with random access: folders, tar files and TensorFlow Datasets.

Each class implements `Files`: it returns name, label and bytes of file i. The order of
the files is the same in every process.
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
  """Interface of a collection of labelled files.

  Attributes:
    path: path of the collection, as the user typed it.
    classes: names of the classes; a label is an index into this list.
  """

  @property
  def path(self) -> str: ...

  @property
  def classes(self) -> Sequence[str]: ...

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
    image_size: height and width of a decoded array.
    channels: number of channels of a decoded array.
    max_unreadable: largest accepted number of unreadable files.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    super().__init__(files.path, max_unreadable)
    self.files = files
    self.num_classes = len(files.classes)
    self.image_shape = (image_size, image_size, channels)

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
  path = os.path.expanduser(path)
  tars = _list_tars(path)
  if tars:
    return TarFiles(path, tars, extensions)
  return FolderFiles(path, extensions)


class FolderFiles:
  """Files in a folder.

  The classes are the subfolders of `path`, sorted; their files may be at any depth. In
  a folder without subfolders, the class of a file is its name up to the first
  underscore, as in ADM (ClassID_ImgID.jpg). If no name has an underscore, there is one
  class. Names that start with a dot are ignored.
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
    """Returns (bytes, label) of a file."""
    data = Path(self.path, self._names[index]).read_bytes()
    return data, int(self._labels[index])


class TarFiles:
  """Files in uncompressed tar files, read without extracting them.

  The layout of ImageNet is supported: a folder with one tar file per class
  (n01440764.tar, …), or one tar file that holds these (ILSVRC2012_img_train.tar). Any
  other tar file is read like a folder with the same contents; see `FolderFiles`.
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
        "config.data.path", path, f"must hold {' '.join(extensions)} files, found none"
      )
    self._entries = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name for entry in self._entries]
    if all(name.count("/") > 1 for name in names):  # a top folder holds the classes
      names = [name.split("/", 1)[1] for name in names]
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    self._labels, self.classes = _label_files(path, names, folders)

  def __len__(self) -> int:
    return len(self._entries)

  def name(self, index: int) -> str:
    return self._entries[index].name

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns (bytes, label) of a file; raises OSError if the tar file is truncated."""
    entry = self._entries[index]
    with open(entry.tar, "rb") as file:
      file.seek(entry.offset)
      data = file.read(entry.size)
    if len(data) < entry.size:
      raise OSError(f"{entry.tar} is truncated within {entry.name}")
    return data, int(self._labels[index])


class TfdsFiles:
  """An image-classification data set of TFDS, prepared as array_record.

  TFDS does not decode the images, so that `ImageSource` decodes them like image files.
  """

  def __init__(self, path: str, split: str):
    # Slow to import. Reading array_record does not need TensorFlow.
    import tensorflow_datasets as tfds

    self.path = path
    name = path.removeprefix(TFDS_PREFIX)
    try:
      builder: Any = tfds.builder(name)
      self._source = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
      self.classes = builder.info.features["label"].names
    except Exception as error:  # TFDS raises many types, with long texts
      reason = (str(error) or type(error).__name__).strip().splitlines()[0]
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


@dataclasses.dataclass(frozen=True, slots=True)  # slots save memory: 1.3 million files
class _TarEntry:
  """A file inside a tar file; `offset` and `size` are in bytes of the outer file."""

  tar: str
  name: str
  offset: int
  size: int


def _list_tars(path: str) -> list[str]:
  """Returns [path] if `path` is a tar file, else the tar files in the folder `path`."""
  if path.endswith(".tar") and os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    return []
  return sorted(str(tar) for tar in Path(path).glob("*.tar"))


def _index_tar(path: str, prefix: str) -> list[_TarEntry]:
  """Lists the files in a tar file and in the tar files that it holds.

  Names start with `prefix`, and with the name of the inner tar file if there is one.
  """
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
            _check_end(inner, f"{path}: {member.name}")
        else:
          entries += _tar_entries(path, prefix, [member])
      _check_end(outer, path)
  except (tarfile.TarError, OSError) as error:
    raise SettingError(
      "config.data.path", path, f"must be an uncompressed tar file: {error}"
    ) from None
  return entries


def _check_end(archive: tarfile.TarFile, name: str) -> None:
  """Checks that a tar file ends where its last entry ends.

  tarfile stops without a word at a damaged header, at the end of a truncated file, and
  at blocks of zeros in the middle.

  Args:
    archive: tar file whose entries have all been read.
    name: name of the tar file, for the error.

  Raises:
    tarfile.ReadError: the file lacks its end, two blocks of zeros, or holds more data.
  """
  file, end = archive.fileobj, archive.offset
  assert file is not None
  file.seek(end)
  found = 0
  while chunk := file.read(1 << 20):
    if chunk.strip(b"\0"):
      raise tarfile.ReadError(
        f"{name} holds more data after the file that ends at byte {end}: a header is "
        "damaged, or several tar files were joined"
      )
    found += len(chunk)
  if found < 2 * tarfile.BLOCKSIZE:
    raise tarfile.ReadError(f"{name} is truncated: it has no end after byte {end}")


def _tar_entries(
  path: str, prefix: str, members: Iterable[tarfile.TarInfo]
) -> list[_TarEntry]:
  """Returns the entries of the regular files among `members`, without hidden files."""
  return [
    _TarEntry(path, prefix + name, member.offset_data, member.size)
    for member in members
    if member.isfile()
    and (name := member.name.removeprefix("./"))
    and not Path(name).name.startswith(".")
  ]


def _list_folder(path: str, extensions: tuple[str, ...]) -> tuple[list[str], list[str]]:
  """Returns (relative paths of the data files, names of the subfolders) of a folder.

  Both lists are sorted, so that the order is the same in every process.
  """
  if not os.path.exists(path):
    raise SettingError(
      "config.data.path", path, "must be a folder; the path does not exist"
    )
  if not os.path.isdir(path):
    raise SettingError("config.data.path", path, "must be a folder, but is a file")

  files: list[str] = []
  classes: list[str] = []
  ignored: list[str] = []  # links that lead in a circle, pipes, devices
  # (path relative to `path`, real paths of the folder and of all folders above it)
  folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(path),))]
  while folders:
    prefix, above = folders.pop()
    try:
      entries = [e for e in os.scandir(os.path.join(path, prefix)) if e.name[0] != "."]
    except OSError as error:
      raise SettingError(
        "config.data.path",
        path,
        f"must hold readable folders; {error.filename}: {error.strerror}",
      ) from error
    for entry in entries:
      name = os.path.join(prefix, entry.name)
      if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
        real = os.path.realpath(entry.path)
        if real in above:
          ignored.append(name)
          continue
        folders.append((name, (*above, real)))
        if not prefix:
          classes.append(name)
      elif entry.name.lower().endswith(extensions):
        (files if _may_be_read(entry) else ignored).append(name)
  if ignored:
    logger.warning(
      "Left out %d links to a folder above, pipes and the like in %s, such as %s",
      len(ignored),
      path,
      min(ignored),
    )
  if not files:
    raise SettingError(
      "config.data.path", path, f"must hold {' '.join(extensions)} files, found none"
    )
  return sorted(files), sorted(classes)


def _may_be_read(entry: os.DirEntry[str]) -> bool:
  """Whether an entry is a file, or a broken link, which counts as an unreadable file.

  Reading a pipe or a device may never end.
  """
  if entry.is_file(follow_symlinks=False):  # needs no call of the system
    return True
  return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _label_files(
  path: str, files: list[str], subfolders: list[str]
) -> tuple[Int32[np.ndarray, " N"], list[str]]:
  """Returns (label of each file, names of the classes); see `FolderFiles`."""
  flat = [name for name in files if "/" not in name]
  if not flat:
    class_of, classes = [name.split("/")[0] for name in files], subfolders
  elif len(flat) < len(files):
    raise SettingError(
      "config.data.path",
      path,
      "must hold either one subfolder per class or only files; found both: "
      f"{len(flat)} files at the top and {len(files) - len(flat)} in subfolders",
    )
  else:
    bare = [name for name in files if "_" not in name]
    if bare and len(bare) < len(files):
      raise SettingError(
        "config.data.path",
        path,
        "either all file names or none must be of the form ClassID_ImgID; "
        f"{len(bare)} of {len(files)} have no underscore, such as {bare[0]}",
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
