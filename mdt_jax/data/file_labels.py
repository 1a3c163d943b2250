"""Labels of files: from their paths, from dataset.json, or from files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from mdt_jax.data import file_names
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger, printable

DATASET_JSON = "dataset.json"  # labels in the layout of StyleGAN and EDM
# Files of a WebDataset shard that hold the label of the image with the same key.
SIDECARS = (".cls", ".json")
LABEL_KEYS = ("label", "cls", "class")  # keys of the label in a .json, in this order
MAX_SIDECAR_BYTES = 1 << 20
MAX_CLASSES = 1_000_000
# Names of the folders of a data set that holds its splits instead of classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FileLabels(NamedTuple):
  """Labels of N files.

  Attributes:
    labels: label of each file.
    classes: names of the classes.
  """

  labels: Int32[np.ndarray, " N"]
  classes: list[str]


def labels_of_paths(
  path: str, files: Sequence[str], subfolders: Sequence[str]
) -> FileLabels:
  """Returns the labels that the paths of files mean; see `folder_files.FolderFiles`.

  Args:
    path: path of the data set.
    files: paths of the files in the data set, with slashes.
    subfolders: names of its folders, sorted. A folder without files is a class too.

  Raises:
    SettingError: the files are in a layout that docs/data.md does not describe.
  """
  flat = [name for name in files if "/" not in name]
  if not flat:
    class_of, classes = [name.split("/")[0] for name in files], list(subfolders)
  elif len(flat) < len(files):
    raise _error(
      path,
      "must hold either one subfolder per class or only files; found both: "
      f"{len(flat)} files at the top and {len(files) - len(flat)} in subfolders",
    )
  else:
    bare = [name for name in files if "_" not in name]
    if bare and len(bare) < len(files):
      raise _error(
        path,
        "either all file names or none must be of the form ClassID_ImgID; "
        f"{len(bare)} of {len(files)} have no underscore, such as {bare[0]}",
      )
    class_of = [name.split("_")[0] if not bare else "" for name in files]
    classes = sorted(set(class_of), key=file_names.to_bytes)
  empty = sorted(set(classes) - set(class_of), key=file_names.to_bytes)
  if empty:
    shown = ", ".join(map(printable, empty[:5])) + (", …" if len(empty) > 5 else "")
    logger.warning(
      "%d of %d classes in %s have no images: %s",
      len(empty),
      len(classes),
      printable(path),
      shown,
    )
  if len(classes) > 1 and {name.lower() for name in classes} <= _SPLITS:
    logger.warning(
      "The classes of %s are %s: to train on one of these folders, give its path",
      printable(path),
      ", ".join(classes),
    )
  return _numbered(class_of, classes)


def labels_of_dataset_json(
  path: str, files: Sequence[str], data: bytes
) -> FileLabels | None:
  """Returns the labels that a dataset.json gives to files.

  Args:
    path: path of the data set.
    files: paths of the files, relative to the folder of dataset.json.
    data: content of dataset.json: {"labels": [["00000/img00000000.png", 6], …]}, or
      null in place of the list, which means one class.

  Returns:
    The labels; None if the JSON has no entry "labels".

  Raises:
    SettingError: the labels are not whole numbers from 0, or a file has no label.
  """
  try:
    found = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise _error(path, f"{DATASET_JSON} cannot be read: {error}") from None
  if not isinstance(found, dict) or "labels" not in found:
    return None
  pairs = found["labels"]
  if pairs is None:
    return FileLabels(np.zeros(len(files), np.int32), [""])
  if not isinstance(pairs, list) or not all(
    isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
    for pair in pairs
  ):
    raise _error(path, f'{DATASET_JSON} must hold "labels": [[NAME, LABEL], …] or null')
  label_of = {name.replace("\\", "/"): label for name, label in pairs}
  missing = [name for name in files if name not in label_of]
  if missing:
    raise _error(
      path,
      f"{DATASET_JSON} has no label for {len(missing):,} of {len(files):,} images, "
      f"such as {missing[0]}",
    )
  if len(label_of) > len(files):
    absent = sorted(label_of.keys() - set(files))
    logger.warning(
      "%s of %s has labels for %s files that are absent, such as %s",
      DATASET_JSON,
      printable(path),
      f"{len(absent):,}",
      printable(absent[0]),
    )
  return _of_values(path, DATASET_JSON, [label_of[name] for name in files])


def labels_of_sidecars(
  path: str, files: Sequence[str], others: Mapping[str, Callable[[], bytes]]
) -> FileLabels | None:
  """Returns the labels of a WebDataset: of the files NAME.cls or NAME.json.

  Args:
    path: path of the data set.
    files: paths of the images.
    others: path of another file -> function that reads it.

  Returns:
    The labels; None if no image has such a file beside it.

  Raises:
    SettingError: an image has no such file, or a label cannot be read.
  """
  for suffix in SIDECARS:
    beside = {sample_key(name): name for name in others if name.endswith(suffix)}
    keys = [sample_key(name) for name in files]
    if not any(key in beside for key in keys):
      continue
    values = []
    for name, key in zip(files, keys, strict=True):
      if key not in beside:
        raise _error(path, f"{name} has no {suffix} file beside it: it has no label")
      values.append(_sidecar_value(path, beside[key], others[beside[key]]()))
    if all(value is None for value in values):
      logger.warning(
        "All images of %s get the label 0: its %s files have none of the keys %s",
        printable(path),
        suffix,
        ", ".join(LABEL_KEYS),
      )
      return FileLabels(np.zeros(len(files), np.int32), [""])
    return _of_values(path, f"its {suffix} files", values)
  return None


def sample_key(name: str) -> str:
  """Returns the key of a WebDataset sample: the path up to the name's first dot."""
  folder, slash, base = name.rpartition("/")
  return folder + slash + base.split(".")[0]


def _sidecar_value(path: str, name: str, data: bytes) -> Any:
  """Returns the label in a .cls or .json file; None for JSON without a label."""
  try:
    if name.endswith(".cls"):
      return int(data.decode("ascii"))
    found = json.loads(data)
  except (ValueError, RecursionError):
    raise _error(path, f"{name} must hold a whole number, or be JSON") from None
  if not isinstance(found, dict):
    raise _error(path, f"{name} must hold a JSON dict")
  for key in LABEL_KEYS:
    if key in found:
      return found[key]
  return None


def _of_values(path: str, where: str, values: list[Any]) -> FileLabels:
  """Returns labels from whole numbers, or from names of classes, for N files.

  Args:
    path: path of the data set.
    where: where the values come from, for errors.
    values: number or name of each file.

  Raises:
    SettingError: the values are neither all numbers in [0, MAX_CLASSES) nor all texts.
  """
  if all(isinstance(value, str) for value in values):
    return _numbered(values, sorted(set(values), key=file_names.to_bytes))
  for value in values:
    if type(value) is not int or not 0 <= value < MAX_CLASSES:
      raise _error(
        path,
        f"{where} must hold labels that are whole numbers in [0, {MAX_CLASSES:,}), or "
        f"all texts; found {repr(value)[:40]}",
      )
  return FileLabels(
    np.array(values, np.int32), [str(i) for i in range(max(values) + 1)]
  )


def _numbered(class_of: Sequence[str], classes: list[str]) -> FileLabels:
  """Returns labels from the class of each file."""
  label_of = {name: label for label, name in enumerate(classes)}
  return FileLabels(np.array([label_of[name] for name in class_of], np.int32), classes)


def _error(path: str, accepted: str) -> SettingError:
  """Returns a SettingError of the setting "config.data.path"."""
  return SettingError("config.data.path", path, printable(accepted))
