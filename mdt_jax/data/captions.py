"""Captions of images, from a file of texts by the names of images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mdt_jax.data import file_names
from mdt_jax.data.condition_files import ImageNames
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger
from mdt_jax.paths import local_path

MAX_BYTES = 1 << 16  # of a caption
_FORMS = (
  "must be a .json file {NAME: TEXT}, or a .txt or .tsv file with lines NAME, tab, TEXT"
)


class Captions:
  """Captions by the names of images.

  Args:
    texts: name, with or without extension -> caption.
    names: the names of all images.
  """

  def __init__(self, texts: Mapping[str, str], names: ImageNames):
    self._texts, self._names = texts, names

  def of(self, name: str) -> str | None:
    """Returns the caption of an image; None if there is none."""
    key = self._names.find(name, self._texts)
    return None if key is None else self._texts[key]


def open_captions(path: str | os.PathLike[str], names: ImageNames) -> Captions:
  """Opens the captions of images.

  Args:
    path: a .json, .txt or .tsv file; see docs/data.md.
    names: the names of all images. Those without caption are counted in the log.

  Raises:
    SettingError: setting "captions": the file cannot be read, has another form, or
      holds a caption for none of the images.
  """
  file = local_path("captions", path)

  def refuse(text: str) -> SettingError:
    return SettingError("captions", os.fspath(path), text)

  suffix = file.suffix.lower()
  if suffix not in (".json", ".txt", ".tsv"):
    raise refuse(_FORMS)
  try:
    texts = _read_json(file) if suffix == ".json" else _read_lines(file)
    for name, text in texts.items():
      if len(text.encode()) > MAX_BYTES:  # raises for a lone surrogate
        raise ValueError(f"the caption of {name} has more than {MAX_BYTES:,} bytes")
  except (OSError, ValueError, RecursionError) as error:
    raise refuse(f"cannot be read: {one_line(error)}; {_FORMS}") from None
  captions = Captions(texts, names)
  missing = [name for name in names.names if not captions.of(name)]
  if len(missing) == len(names.names):
    raise refuse(f"holds no caption of the images, such as {one_line(missing[0])}")
  if missing:
    logger.warning(
      "%d of %d images have no caption in %s, such as %s",
      len(missing),
      len(names.names),
      file.name,
      one_line(missing[0]),
    )
  return captions


def _read_json(file: Path) -> dict[str, str]:
  found = json.loads(file.read_bytes())
  if not isinstance(found, dict) or not all(
    isinstance(text, str) for text in found.values()
  ):
    raise ValueError("it does not hold one text for each name")
  return found


def _read_lines(file: Path) -> dict[str, str]:
  found: dict[str, str] = {}
  lines = file_names.from_bytes(file.read_bytes()).split("\n")
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    name, tab, text = line.removesuffix("\r").partition("\t")
    if not tab:
      raise ValueError(f"line {number} has no tab")
    if name in found:
      raise ValueError(f"line {number} holds the name {name} again")
    found[name] = text
  return found
