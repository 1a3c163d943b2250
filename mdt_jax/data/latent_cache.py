"""Copies of latent sets of buckets on local disks, which training reads.

Training reads records in random order, from anywhere in the set, so each host needs all
shards. `copy_set` copies them to DIR/NAME-CHECKSUM/, once for all processes of a host.
CHECKSUM is that of the path and the card, so that sets never mix. A copy is a latent
set like any other, and holds two more files: .lock, which the copying process locks,
and copied.json, with the checksum that each shard had in the bucket.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from mdt_jax import buckets
from mdt_jax.atomic import atomic_write, read_json, write_json
from mdt_jax.data.bucket_shards import find_shards
from mdt_jax.data.latent_card import CARD, read_card
from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.logs import counted, logger
from mdt_jax.paths import local_path, output_folder

SETTING = "config.data.cache"
COPIED = "copied.json"
LOCK = ".lock"
MAX_NAME = 60  # characters of the set's name in the name of its copy
SECONDS_BETWEEN_LINES = 10.0  # of the log, while shards are copied
SECONDS_BETWEEN_LOOKS = 0.5  # at the lock of another process
TRIES = 2  # of a shard that arrives with another checksum


def copy_set(
  path: str | os.PathLike[str], cache: str | os.PathLike[str] | None
) -> Path:
  """Copies the missing shards of a latent set from its bucket to a local disk.

  One process of a host copies at a time; the others wait, and then find the copy
  complete. If a call is interrupted, the next call keeps the shards that are complete.

  Args:
    path: folder of the set, gs://….
    cache: local folder that receives the copy, in a folder of its own.

  Returns:
    The folder of the copy, a complete latent set.

  Raises:
    SettingError: setting "config.data.path": there is no complete set, or the bucket
      cannot be read. Setting "config.data.cache": it is missing or cannot be written,
      or the disk is too small (nothing is copied then) or full.
    DataUnavailable: the bucket does not answer; the same call resumes.
  """
  into = check_cache(path, cache)
  card = read_card(path)
  source = buckets.bucket_path("config.data.path", path)
  with buckets.one_line_errors("config.data.path", source):
    content = (source / CARD).read_bytes()
  checksums = find_shards(source, card["shards"])
  checksum = zlib.crc32(content, zlib.crc32(str(source).encode()))
  folder = into / f"{source.name[:MAX_NAME]}-{checksum:08x}"
  with _disk_errors(cache):
    _check_room(path, folder, cache, _missing(folder, card["shards"], checksums))
    with _locked(folder):
      if missing := _missing(folder, card["shards"], checksums):
        _copy(source, folder, card["shards"], missing, checksums)
      if missing or not (folder / CARD).is_file():
        with atomic_write(folder / CARD, f".{secrets.token_hex(4)}") as partial:
          partial.write_bytes(content)
  return folder


def check_cache(
  path: str | os.PathLike[str], cache: str | os.PathLike[str] | None
) -> Path:
  """Returns the local path of `cache`, in which files can be written.

  Raises:
    SettingError: see `copy_set`.
  """
  if not cache:
    raise SettingError(
      SETTING,
      cache,
      f"must be given, a folder on a local disk: training reads a copy of {path}",
    )
  folder = local_path(SETTING, cache)
  output_folder(SETTING, cache)
  return folder


def _missing(
  folder: Path, shards: list[dict[str, Any]], checksums: dict[str, str | None]
) -> list[dict[str, Any]]:
  """The shards that the copy does not hold as they are in the bucket."""
  copied = _read_copied(folder)

  def is_copied(shard: dict[str, Any]) -> bool:
    name = shard["file"]
    is_same = name in copied and copied[name] == checksums[name]
    return is_same and _size(folder / name) == shard["bytes"]

  return [shard for shard in shards if not is_copied(shard)]


def _read_copied(folder: Path) -> dict[str, Any]:
  """Reads copied.json; a missing or damaged file counts as empty."""
  with contextlib.suppress(FileNotFoundError, ValueError):
    return read_json(folder / COPIED, ValueError)
  return {}


def _size(file: Path) -> int:
  """Size of a file in bytes; 0 if it is missing."""
  with contextlib.suppress(FileNotFoundError):
    return file.stat().st_size
  return 0


def _check_room(
  path: str | os.PathLike[str], folder: Path, cache: Any, missing: list[dict[str, Any]]
) -> None:
  """Raises SettingError if the missing shards do not fit on the disk."""
  above = folder.absolute()
  while not above.exists():
    above = above.parent
  # The room comes first: another process may be copying.
  free = shutil.disk_usage(above).free
  needed = sum(shard["bytes"] - _size(folder / shard["file"]) for shard in missing)
  needed -= sum(map(_size, folder.glob(".*.partial")))
  if missing and needed > free:
    raise SettingError(
      SETTING,
      os.fspath(cache),
      f"needs {needed / 1e9:.1f} GB more for the copy of {path}; {free / 1e9:.1f} GB "
      "are free on this disk",
    )


def _copy(
  source: epath.Path,
  folder: Path,
  shards: list[dict[str, Any]],
  missing: list[dict[str, Any]],
  checksums: dict[str, str | None],
) -> None:
  """Copies the missing shards one after another; copied.json follows each."""
  known = {shard["file"] for shard in shards}
  copied = {name: v for name, v in _read_copied(folder).items() if name in known}
  total = sum(shard["bytes"] for shard in missing)
  count = counted(len(missing), "shard")
  logger.info("copying %s, %.2f GB, from %s to %s", count, total / 1e9, source, folder)
  progress = _Progress(len(missing), total)
  for shard in missing:
    name, size = shard["file"], shard["bytes"]
    (folder / name).unlink(missing_ok=True)
    for number in range(TRIES):
      found = _copy_shard(source / name, folder / name, size, progress.add)
      if checksums[name] in (None, found):
        break
      (folder / name).unlink()
      progress.add(-size)
      if number == TRIES - 1:
        raise DataUnavailable(
          f"{source / name}: the copy has the CRC-32C {found}, not {checksums[name]}"
        )
    copied[name] = checksums[name]
    write_json(folder / COPIED, copied)
    progress.shards += 1
  progress.log()


def _copy_shard(
  source: epath.Path, target: Path, size: int, progress: Callable[[int], None]
) -> str:
  """Copies a shard, and returns its CRC-32C in base64."""
  import google_crc32c

  checksum: Any = google_crc32c.Checksum()
  with (
    atomic_write(target, f".{secrets.token_hex(4)}") as partial,
    partial.open("wb") as file,
  ):
    for part in _parts(source, size):
      file.write(part)
      checksum.update(part)
      progress(len(part))
  return base64.b64encode(checksum.digest()).decode()


def _parts(source: epath.Path, size: int) -> Iterator[bytes]:
  """Yields the content of a shard; exceptions of gcsfs become errors of one line."""
  arrived = 0
  parts = buckets.read_parts(source, size)
  while arrived < size:
    try:
      with buckets.one_line_errors("config.data.path", source):
        part = next(parts)
    except FileNotFoundError:
      raise SettingError("config.data.path", str(source), "is missing") from None
    arrived += len(part)
    yield part


class _Progress:
  """Logs how much is copied, every `SECONDS_BETWEEN_LINES`.

  Attributes:
    shards: number of copied shards.

  Args:
    num_shards: number of shards to copy.
    num_bytes: bytes to copy.
  """

  def __init__(self, num_shards: int, num_bytes: int):
    self.shards = 0
    self._num_shards, self._num_bytes = num_shards, num_bytes
    self._bytes = 0
    self._start = self._last = time.monotonic()

  def add(self, count: int) -> None:
    """Counts copied bytes."""
    self._bytes += count
    if time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
      self.log()

  def log(self) -> None:
    """Logs one line."""
    self._last = time.monotonic()
    logger.info(
      "copied %d of %d shards, %.2f of %.2f GB, %.3f GB/s",
      self.shards,
      self._num_shards,
      self._bytes / 1e9,
      self._num_bytes / 1e9,
      self._bytes / 1e9 / max(self._last - self._start, 1e-9),
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Creates a folder, and locks it against other processes for the block.

  The lock ends with the process. Waits while another process holds the lock.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / LOCK).open("ab") as file:
    is_waiting = False
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not is_waiting:
          logger.info("another process copies to %s: waiting for it", folder)
        is_waiting = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
        continue
      except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s)", folder, error)
      else:
        for partial in folder.glob(".*.partial"):  # of processes that were killed
          partial.unlink(missing_ok=True)
      break
    yield


@contextlib.contextmanager
def _disk_errors(cache: Any) -> Iterator[None]:
  """Turns errors of the local disk into a SettingError."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    raise SettingError(
      SETTING,
      os.fspath(cache),
      f"cannot be written: {reason}; copied shards remain, the same command resumes",
    ) from None
