"""Checksums of checkpoints, to detect damaged files before they are used."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from mdt_jax.atomic import atomic_write

FILE = "checksums.json"  # inside the folder of a checkpoint
UNFINISHED = f"{FILE} is missing: the save was not finished"
_OWN = "seal"  # key of the checksum of all other entries; part of the file format
_CHUNK = 1 << 22  # bytes read at a time


def write_checksums(folder: Path) -> None:
  """Writes size and CRC-32 of each file of a complete checkpoint to checksums.json."""
  files = {name: _checksum(folder / name) for name in _files(folder)}
  with atomic_write(folder / FILE) as partial:
    partial.write_text(json.dumps({"files": files, _OWN: _of_names(files)}))


def damage(folder: Path, items: Sequence[str] | None = None) -> str | None:
  """Compares the files of a checkpoint with their checksums.

  Args:
    folder: folder of the checkpoint.
    items: subfolders to check, such as "ema"; None checks all files.

  Returns:
    A description of the damage for messages; None if the checkpoint is intact.
  """
  for path in folder.rglob("*"):  # reading a pipe would hang, whoever reads it
    if path.exists() and not (path.is_file() or path.is_dir()):
      return f"{path.relative_to(folder)} is not a file"
  try:
    written = json.loads((folder / FILE).read_text())
    files = written["files"]
    if written[_OWN] != _of_names(files):
      return f"{FILE} is damaged"
  except FileNotFoundError:
    return UNFINISHED
  except (OSError, ValueError, KeyError, TypeError):
    return f"{FILE} is damaged"
  for name, (size, checksum) in files.items():
    if items is not None and Path(name).parts[0] not in items:
      continue
    path = folder / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes instead of {size}"
    if _checksum(path) != [size, checksum]:
      return f"{name} does not match its checksum"
  return None


def checksum_of(path: Path) -> str:
  """CRC-32 of a file, or of the checksums of a checkpoint's files: 8 hex digits."""
  if path.is_dir():
    written = json.loads((path / FILE).read_text())
    return f"{written[_OWN]:08x}"
  return f"{_checksum(path)[1]:08x}"


def _files(folder: Path) -> list[str]:
  """Relative paths of the files of a checkpoint, without checksums.json."""
  return sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file() and path.name not in (FILE, f".{FILE}.partial")
  )


def _checksum(path: Path) -> list[int]:
  """[size in bytes, CRC-32] of a file."""
  size = checksum = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      size += len(chunk)
      checksum = zlib.crc32(chunk, checksum)
  return [size, checksum]


def _of_names(files: dict[str, list[int]]) -> int:
  """The checksum of the checksums, to detect damage of checksums.json."""
  return zlib.crc32(json.dumps(files, sort_keys=True).encode())
