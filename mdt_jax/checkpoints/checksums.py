"""Checksums of checkpoints: a flipped byte is noticed before anything trains on it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

FILE = "checksums.json"  # inside the folder of a checkpoint
_OWN = "seal"  # entry for the checksum of all others; part of the format
_CHUNK = 1 << 22


def write_checksums(folder: Path) -> None:
  """Writes size and CRC-32 of every file of a finished checkpoint into its folder."""
  files = {name: _checksum(folder / name) for name in _files(folder)}
  partial = folder / f".{FILE}.partial"
  partial.write_text(json.dumps({"files": files, _OWN: _of_names(files)}))
  os.replace(partial, folder / FILE)


def damage(folder: Path, items: Sequence[str] | None = None) -> str | None:
  """What is wrong with a checkpoint, in words; None where nothing is.

  Args:
    folder: of the checkpoint.
    items: folders in it to look at; None for all that is there.
  """
  try:
    written = json.loads((folder / FILE).read_text())
    files = written["files"]
    if written[_OWN] != _of_names(files):
      return f"{FILE} is damaged"
  except FileNotFoundError:
    return f"{FILE} is missing: it was not finished"
  except (OSError, ValueError, KeyError, TypeError):
    return f"{FILE} is damaged"
  for name, (size, checksum) in files.items():
    if items is not None and Path(name).parts[0] not in items:
      continue
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes, where {size} were written"
    if _checksum(path) != [size, checksum]:
      return f"{name} has other bytes than were written"
  return None


def _files(folder: Path) -> list[str]:
  return sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file() and path.name not in (FILE, f".{FILE}.partial")
  )


def _checksum(path: Path) -> list[int]:
  """[size, CRC-32]."""
  size = checksum = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      size += len(chunk)
      checksum = zlib.crc32(chunk, checksum)
  return [size, checksum]


def _of_names(files: dict[str, list[int]]) -> int:
  """A checksum of the checksums, so that the file of checksums is guarded too."""
  return zlib.crc32(json.dumps(files, sort_keys=True).encode())
