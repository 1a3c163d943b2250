"""Labelled files in a folder; the class of a file derives from its path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from mdt_jax.data.examples import count_labels
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger


class FolderFiles:
  """Files in a folder.

  The classes are the subfolders of `path`, sorted; their files may be at any depth. In
  a folder without subfolders, the class of a file is its name up to the first
  underscore, as in ADM (ClassID_ImgID.jpg). If no name has an underscore, there is one
  class. Names that start with a dot are ignored.
  """

  def __init__(self, path: str, extensions: tuple[str, ...]):
    self.path = path
    self._names, subfolders = _list_folder(path, extensions)
    self._labels, self.classes = label_files(path, self._names, subfolders)
    self.label_counts = count_labels(self._labels)

  def __len__(self) -> int:
    return len(self._names)

  def name(self, index: int) -> str:
    return self._names[index]

  def read(self, index: int) -> tuple[bytes, int]:
    """Returns (bytes, label) of a file."""
    data = Path(self.path, self._names[index]).read_bytes()
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


def label_files(
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
