"""Labelled files in uncompressed tar files, read without extracting them."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from mdt_jax.data.examples import count_labels
from mdt_jax.data.folder_files import label_files
from mdt_jax.errors import SettingError


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
    self._labels, self.classes = label_files(path, names, folders)
    self.label_counts = count_labels(self._labels)

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


@dataclasses.dataclass(frozen=True, slots=True)  # slots save memory: 1.3 million files
class _TarEntry:
  """A file inside a tar file; `offset` and `size` are in bytes of the outer file."""

  tar: str
  name: str
  offset: int
  size: int


def list_tars(path: str) -> list[str]:
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
