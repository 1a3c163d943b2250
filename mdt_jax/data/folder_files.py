"""Labelled files in a folder; the class of a file derives from its path."""

from __future__ import annotations

import os
from pathlib import Path

from mdt_jax.data import file_names
from mdt_jax.data.examples import count_labels
from mdt_jax.data.file_labels import (
  DATASET_JSON,
  labels_of_dataset_json,
  labels_of_paths,
)
from mdt_jax.data.left_out import HIDDEN, LeftOut, is_hidden
from mdt_jax.errors import SettingError


class FolderFiles:
  """Files in a folder.

  The classes are the subfolders of `path`, sorted; their files may be at any depth. In
  a folder without subfolders, the class of a file is its name up to the first
  underscore, as in ADM (ClassID_ImgID.jpg). If no name has an underscore, there is one
  class. If the folder holds a dataset.json with labels, as StyleGAN and EDM write it,
  the labels are those. Names that start with a dot are ignored.
  """

  def __init__(self, path: str, extensions: tuple[str, ...]):
    self.path = path
    self._names, subfolders = _list_folder(path, extensions)
    found = None
    if os.path.isfile(listed := os.path.join(path, DATASET_JSON)):
      try:
        text = Path(listed).read_bytes()
      except OSError as error:
        accepted = f"{DATASET_JSON} in it cannot be read: {error.strerror}"
        raise SettingError("config.data.path", path, accepted) from None
      found = labels_of_dataset_json(path, self._names, text)
    self._labels, self.classes = found or labels_of_paths(path, self._names, subfolders)
    self.label_counts = count_labels(self._labels)

  def __len__(self) -> int:
    return len(self._names)

  def name(self, index: int) -> str:
    return self._names[index]

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns (bytes, label) of a file."""
    data = Path(self.path, file_names.to_path(self._names[index])).read_bytes()
    return data, int(self._labels[index])


def _list_folder(path: str, extensions: tuple[str, ...]) -> tuple[list[str], list[str]]:
  """Returns (relative paths of the data files, names of the subfolders) of a folder.

  Both lists are sorted, so that the order is the same in every process.
  """
  if not os.path.exists(path):
    raise SettingError(
      "config.data.path", path, "must be a folder; the path does not exist"
    )
  if not os.path.isdir(path):
    raise SettingError(
      "config.data.path",
      path,
      "must be a folder or an uncompressed .tar file, but is another file",
    )

  files: list[str] = []
  classes: list[str] = []
  left_out = LeftOut()
  # (path relative to `path`, real paths of the folder and of all folders above it)
  folders: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(path),))]
  while folders:
    prefix, above = folders.pop()
    try:
      entries = list(os.scandir(os.path.join(path, prefix)))
    except OSError as error:
      raise SettingError(
        "config.data.path",
        path,
        f"must hold readable folders; {error.filename}: {error.strerror}",
      ) from error
    for entry in entries:
      name = os.path.join(prefix, entry.name)
      if is_hidden(entry.name):
        left_out.add(HIDDEN, name)
      elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
        real = os.path.realpath(entry.path)
        if real in above:
          left_out.add("links to a folder above", name)
          continue
        folders.append((name, (*above, real)))
        if not prefix:
          classes.append(name)
      elif not entry.name.lower().endswith(extensions):
        if name != DATASET_JSON:
          left_out.add_file(name)
      elif _may_be_read(entry):
        files.append(name)
      else:
        left_out.add("pipes, devices or links to them", name)
  left_out.log(path)
  if not files:
    raise SettingError(
      "config.data.path", path, f"must hold {' '.join(extensions)} files, found none"
    )
  return _sorted_names(files), _sorted_names(classes)


def _sorted_names(paths: list[str]) -> list[str]:
  """Returns the names of paths in an order that the locale does not change."""
  return sorted(map(file_names.from_path, paths), key=file_names.to_bytes)


def _may_be_read(entry: os.DirEntry[str]) -> bool:
  """Whether an entry is a file, or a broken link, which counts as an unreadable file.

  Reading a pipe or a device may never end.
  """
  if entry.is_file(follow_symlinks=False):  # needs no call of the system
    return True
  return os.path.isfile(entry.path) or not os.path.exists(entry.path)
