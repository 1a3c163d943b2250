"""Labelled files in uncompressed tar files, read without extracting them."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mdt_jax.data import file_names
from mdt_jax.data.examples import count_labels
from mdt_jax.data.file_labels import (
  DATASET_JSON,
  MAX_SIDECAR_BYTES,
  SIDECARS,
  FileLabels,
  labels_of_dataset_json,
  labels_of_paths,
  labels_of_sidecars,
)
from mdt_jax.data.left_out import HIDDEN, LeftOut, is_hidden
from mdt_jax.errors import SettingError


class TarFiles:
  """Files in uncompressed tar files, read without extracting them.

  The layouts of ImageNet and of WebDataset are supported:
  - a folder with one tar file per class (n01440764.tar, …), or one tar file that holds
    these (ILSVRC2012_img_train.tar);
  - shards, in which each image has its label beside it (000001.jpg, 000001.cls).
  Any other tar file is read like a folder with the same contents; see `FolderFiles`.
  """

  def __init__(self, path: str, tars: list[str], extensions: tuple[str, ...]):
    self.path = path
    left_out = LeftOut()
    entries, others = [], []
    for tar in tars:
      prefix = "" if tar == path else f"{file_names.from_path(Path(tar).stem)}/"
      for entry in _index_tar(tar, prefix, left_out):
        is_data = entry.name.lower().endswith(extensions)
        (entries if is_data else others).append(entry)
    if path not in tars:
      for name in sorted(set(os.listdir(path)) - {Path(tar).name for tar in tars}):
        left_out.add("files or folders beside the .tar files", name)
    if not entries:
      left_out.log(path)
      raise SettingError(
        "config.data.path", path, f"must hold {' '.join(extensions)} files, found none"
      )
    self._entries = sorted(entries, key=lambda entry: file_names.to_bytes(entry.name))
    stored = self._stored_labels(others)
    for entry in others:
      if stored is None or not entry.name.endswith((*SIDECARS, DATASET_JSON)):
        left_out.add_file(entry.name)
    left_out.log(path)
    self._labels, self.classes = stored or self._labels_of_paths()
    self.label_counts = count_labels(self._labels)

  def __len__(self) -> int:
    return len(self._entries)

  def name(self, index: int) -> str:
    return self._entries[index].name

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns (bytes, label) of a file; raises OSError if the tar file is truncated."""
    return self._entries[index].read(), int(self._labels[index])

  def _labels_of_paths(self) -> FileLabels:
    """The labels that the paths of the files mean."""
    inside = [entry.name for entry in self._entries]
    if all(name.count("/") > 1 for name in inside):  # a top folder holds the classes
      inside = [name.split("/", 1)[1] for name in inside]
    folders = {name.split("/")[0] for name in inside if "/" in name}
    return labels_of_paths(self.path, inside, sorted(folders, key=file_names.to_bytes))

  def _stored_labels(self, others: list[_TarEntry]) -> FileLabels | None:
    """The labels that other files of the tar files hold; None if there are none."""
    images = [entry.name for entry in self._entries]
    for entry in others:
      folder, _, base = entry.name.rpartition("/")
      if base == DATASET_JSON and folder.count("/") == 0:
        start = len(folder) + bool(folder)
        top = entry.name[:start]
        inside = [name[start:] for name in images if name.startswith(top)]
        if len(inside) == len(images):
          found = labels_of_dataset_json(self.path, inside, entry.read())
          if found is not None:
            return found
    sidecars = {
      entry.name: entry.read
      for entry in others
      if entry.name.endswith(SIDECARS) and entry.size <= MAX_SIDECAR_BYTES
    }
    return labels_of_sidecars(self.path, images, sidecars)


# The names of files are those of `file_names`, whatever the locale.
_OPTIONS: Any = {"encoding": "utf-8", "errors": "surrogateescape"}


@dataclasses.dataclass(frozen=True, slots=True)  # slots save memory: 1.3 million files
class _TarEntry:
  """A file inside a tar file; `offset` and `size` are in bytes of the outer file."""

  tar: str
  name: str
  offset: int
  size: int

  def read(self) -> bytes:
    """Returns the content; raises OSError if the tar file is truncated."""
    with open(self.tar, "rb") as file:
      file.seek(self.offset)
      data = file.read(self.size)
    if len(data) < self.size:
      raise OSError(f"{self.tar} is truncated within {self.name}")
    return data


def list_tars(path: str) -> list[str]:
  """Returns [path] if `path` is a tar file, else the tar files in the folder `path`."""
  if path.endswith(".tar") and os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    return []
  tars = (tar for tar in Path(path).glob("*.tar") if not is_hidden(tar.name))
  return sorted(str(tar) for tar in tars if tar.is_file())


def _index_tar(path: str, prefix: str, left_out: LeftOut) -> list[_TarEntry]:
  """Lists the files in a tar file and in the tar files that it holds.

  Names start with `prefix`, and with the name of the inner tar file if there is one.
  """
  entries = []
  try:
    with tarfile.open(path, "r:", **_OPTIONS) as outer:
      for member in outer:
        base = member.name.rpartition("/")[2]
        if member.isfile() and base.endswith(".tar") and not is_hidden(base):
          folder = f"{prefix}{Path(member.name).stem}/"
          with tarfile.open(
            fileobj=outer.extractfile(member), mode="r:", **_OPTIONS
          ) as inner:
            entries += [
              dataclasses.replace(entry, offset=entry.offset + member.offset_data)
              for entry in _tar_entries(path, folder, inner, left_out)
            ]
            _check_end(inner, f"{path}: {member.name}")
        else:
          entries += _tar_entries(path, prefix, [member], left_out)
      _check_end(outer, path)
  # MemoryError, OverflowError: a header that claims a huge size.
  except (tarfile.TarError, OSError, MemoryError, OverflowError, ValueError) as error:
    if isinstance(error, SettingError):
      raise
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
  path: str, prefix: str, members: Iterable[tarfile.TarInfo], left_out: LeftOut
) -> list[_TarEntry]:
  """Returns the entries of the regular files among `members`, without hidden files."""
  entries = []
  for member in members:
    name = member.name.removeprefix("./")
    if member.isdir():
      continue
    if any(map(is_hidden, name.split("/"))):
      left_out.add(HIDDEN, name)
    elif not member.isreg():
      left_out.add("links, pipes or devices", name)
    elif member.issparse():
      raise tarfile.ReadError(f"{name} is sparse: write the tar file without --sparse")
    else:
      entries.append(_TarEntry(path, prefix + name, member.offset_data, member.size))
  return entries
