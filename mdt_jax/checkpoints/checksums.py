"""Checksums of checkpoints, to detect damaged files before they are used."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath, list_objects, one_line_errors

FILE = "checksums.json"  # inside the folder of a checkpoint
UNFINISHED = f"{FILE} is missing: the save was not finished"
_OWN = "seal"  # key of the checksum of all other entries; part of the file format
_CHUNK = 1 << 22  # bytes read at a time
_READERS = 8  # files of a bucket that are read at the same time


def write_checksums(folder: AnyPath) -> None:
  """Writes size and CRC-32 of each file of a complete checkpoint to checksums.json."""
  names = _files(folder)
  files = dict(zip(names, _checksums(folder, names), strict=True))
  with atomic_write(folder / FILE) as partial:
    partial.write_text(json.dumps({"files": files, _OWN: _of_names(files)}))


def damage(folder: AnyPath, items: Sequence[str] | None = None) -> str | None:
  """Compares the files of a checkpoint with their checksums.

  Args:
    folder: folder of the checkpoint.
    items: subfolders to check, such as "ema"; None checks all files.

  Returns:
    A description of the damage for messages; None if the checkpoint is intact.

  Raises:
    DataUnavailable, SettingError: checksums.json cannot be read from the bucket.
  """
  if isinstance(folder, Path):
    for path in folder.rglob("*"):  # reading a pipe would hang, whoever reads it
      if path.exists() and not (path.is_file() or path.is_dir()):
        return f"{path.relative_to(folder)} is not a file"
  try:
    written = json.loads(_read(folder / FILE))
    files = written["files"]
    if written[_OWN] != _of_names(files):
      return f"{FILE} is damaged"
  except FileNotFoundError:
    return UNFINISHED
  except (IsADirectoryError, ValueError, KeyError, TypeError):
    return f"{FILE} is damaged"  # other OSErrors may pass, and are no damage
  names = [
    name for name in files if items is None or PurePosixPath(name).parts[0] in items
  ]
  sizes = _sizes(folder, names)
  for name in names:
    if sizes[name] is None:
      return f"{name} is missing"
    if sizes[name] != files[name][0]:
      return f"{name} has {sizes[name]} bytes instead of {files[name][0]}"
  for name, found in zip(names, _checksums(folder, names), strict=True):
    if found != files[name]:
      return f"{name} does not match its checksum"
  return None


def _read(path: AnyPath) -> bytes:
  """Reads a file; a bucket that does not answer is no damage."""
  if isinstance(path, Path):
    return path.read_bytes()
  with one_line_errors("path", path):
    return path.read_bytes()


def checksum_of(path: AnyPath) -> str:
  """CRC-32 of a file, or of the checksums of a checkpoint's files: 8 hex digits."""
  if path.is_dir():
    written = json.loads((path / FILE).read_text())
    return f"{written[_OWN]:08x}"
  return f"{_checksum(path)[1]:08x}"


def _files(folder: AnyPath) -> list[str]:
  """Relative paths of the files of a checkpoint, without checksums.json."""
  if isinstance(folder, Path):
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (str(path.relative_to(folder)) for path in files)
  else:
    names = list_objects(folder)
  return sorted(
    name for name in names if PurePosixPath(name).name not in (FILE, f".{FILE}.partial")
  )


def _sizes(folder: AnyPath, names: Sequence[str]) -> dict[str, int | None]:
  """Size of each file in bytes; None for one that is missing."""
  if isinstance(folder, Path):
    paths = {name: folder / name for name in names}
    return {n: p.stat().st_size if p.is_file() else None for n, p in paths.items()}
  found = list_objects(folder)
  return {name: found.get(name) for name in names}


def _checksums(folder: AnyPath, names: Sequence[str]) -> Iterator[list[int]]:
  """[size in bytes, CRC-32] of files, in order."""
  paths = [folder / name for name in names]
  if isinstance(folder, Path):
    yield from map(_checksum, paths)
    return
  with ThreadPoolExecutor(_READERS) as threads:
    yield from threads.map(_checksum, paths)


def _checksum(path: AnyPath) -> list[int]:
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
