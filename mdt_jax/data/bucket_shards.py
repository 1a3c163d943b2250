"""The shards of a latent set in a bucket: compared with the card, and read in order.

ArrayRecord reads local files. `BucketRecords` serves commands that read a set once,
from the first record to the last. Training reads in random order, from a copy of the
set; see `latent_cache`.
"""

from __future__ import annotations

import tempfile
import threading
from typing import Any

import numpy as np
from etils import epath

from mdt_jax import buckets
from mdt_jax.errors import SettingError


def find_shards(
  folder: epath.Path, shards: list[dict[str, Any]]
) -> dict[str, str | None]:
  """Compares the shards in a bucket with the card.

  Args:
    folder: folder of the set.
    shards: the entries of the shards in the card.

  Returns:
    File name of each shard -> its CRC-32C in base64; None if the server gives none.

  Raises:
    SettingError: a shard is missing or has another size, or the bucket cannot be read.
    DataUnavailable: the bucket does not answer.
  """
  with buckets.one_line_errors("config.data.path", folder):
    sizes = buckets.list_objects(folder)
    checksums = buckets.list_checksums(folder)
  for shard in shards:
    name, expected = shard["file"], shard["bytes"]
    if name not in sizes:
      raise SettingError("config.data.path", str(folder), f"{name} is missing")
    if sizes[name] != expected:
      raise SettingError(
        "config.data.path",
        str(folder),
        f"{name} must have {expected} bytes (card.json), has {sizes[name]}",
      )
  return {shard["file"]: checksums.get(shard["file"]) for shard in shards}


class BucketRecords:
  """The records of a latent set in a bucket, for reading in order.

  Each shard is downloaded when one of its records is read, and deleted when a record of
  another shard is read. So the local disk needs room for one shard. Reading is
  thread-safe.

  Args:
    folder: folder of the set.
    shards: the entries of the shards in the card.

  Raises:
    SettingError, DataUnavailable: see `find_shards`. `__getitem__` raises both too; and
      SettingError if a shard has another number of records than in the card.
  """

  def __init__(self, folder: epath.Path, shards: list[dict[str, Any]]):
    find_shards(folder, shards)
    self._folder, self._shards = folder, shards
    self._ends = np.cumsum([shard["images"] for shard in shards])
    self._lock = threading.Lock()
    self._open: tuple[int, Any, Any] | None = None  # shard, its file and its reader

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> bytes:
    number = int(np.searchsorted(self._ends, index, side="right"))
    start = int(self._ends[number - 1]) if number else 0
    with self._lock:
      return self._reader(number).read([index - start])[0]

  def _reader(self, number: int) -> Any:
    """The reader of a shard, which is downloaded unless it is the open one."""
    from array_record.python.array_record_module import ArrayRecordReader

    if self._open is not None and self._open[0] == number:
      return self._open[2]
    if self._open is not None:
      _, file, reader = self._open
      self._open = None
      reader.close()
      file.close()
    shard = self._shards[number]
    path = self._folder / shard["file"]
    # The file has no name, so nothing is left even if the process is killed.
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115
    with buckets.one_line_errors("config.data.path", path):
      for part in buckets.read_parts(path, shard["bytes"]):
        file.write(part)
      file.flush()
    reader = ArrayRecordReader(f"/dev/fd/{file.fileno()}")
    if reader.num_records() != shard["images"]:
      raise SettingError(
        "config.data.path",
        str(path),
        f"must hold {shard['images']} records (card.json), holds "
        f"{reader.num_records()}",
      )
    self._open = (number, file, reader)
    return reader
