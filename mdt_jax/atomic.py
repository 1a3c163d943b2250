"""Atomic writing of files: a reader sees the old or the new file, never a part.

This holds after a power cut too: the contents reach the disk before the name does. A
bucket has this property by itself.
`read_json` reads files that `write_json` or a user wrote.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mdt_jax import buckets
from mdt_jax.buckets import AnyPath

# Errors of file systems that cannot wait, such as some network file systems.
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
# Far above the card of the largest latent set, which counts the labels of each shard.
MAX_JSON = 2**30  # bytes


@contextlib.contextmanager
def atomic_write(path: AnyPath, writer: str = "") -> Iterator[Path]:
  """Yields a temporary path, and moves the file there to `path` on success.

  If the body raises an exception, the temporary file is deleted and `path` remains
  unchanged. The temporary file of a bucket's object lies on the local disk.

  Args:
    path: path of the file; its folder is created if needed.
    writer: suffix of the temporary name; must be unique if several writers of `path`
      can run at the same time.
  """
  if not isinstance(path, Path):
    with tempfile.TemporaryDirectory(prefix="mdt_jax_") as folder:
      local = Path(folder) / path.name
      yield local
      buckets.upload_file(local, path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}{writer}.partial")
  try:
    yield partial
    _to_disk(partial)
    os.replace(partial, path)
    _to_disk(path.parent)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: AnyPath, value: Any) -> None:
  """Writes `value` as JSON atomically, even if several processes write `path`."""
  unique = f".{secrets.token_hex(4)}"  # process ids are not unique across hosts
  with atomic_write(path, unique) as partial:
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(
  path: AnyPath,
  refuse: Callable[[str], Exception],
  max_bytes: int = MAX_JSON,
) -> dict[str, Any]:
  """Reads a JSON dict from a file that may be damaged.

  Args:
    path: path of the file, or of a link to the file.
    refuse: makes the error that is raised from one line about the file, such as
      "card.json must hold a dict".
    max_bytes: largest accepted size of the file.

  Raises:
    FileNotFoundError: there is no such file.
    DataUnavailable: the bucket of the file does not answer.
    Exception: the error of `refuse`: the file cannot be read, is a folder, a FIFO or a
      device, is larger than `max_bytes`, or holds anything but a JSON dict in UTF-8.
  """
  try:
    if isinstance(path, Path):
      content = _read_regular(path, max_bytes)
    else:
      content = buckets.read_object(path)
    if len(content) > max_bytes:
      raise ValueError(f"it has more than {max_bytes:,} bytes")
    found = json.loads(content.decode("utf-8"))
  except FileNotFoundError:
    raise
  except RecursionError:
    raise refuse(f"{path.name} cannot be read: it is nested too deep") from None
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or error
    raise refuse(f"{path.name} cannot be read: {reason}") from None
  if not isinstance(found, dict):
    raise refuse(f"{path.name} must hold a dict")
  return found


def _read_regular(path: Path, max_bytes: int) -> bytes:
  """Reads a local file, at most one byte more than `max_bytes`.

  Raises:
    OSError, ValueError: the file cannot be read, or is no regular file.
  """
  # Without O_NONBLOCK, opening a FIFO waits for its other end.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  with open(descriptor, "rb") as file:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
      raise ValueError("it is no regular file")
    # Python sets aside as many bytes as it is asked to read.
    return file.read(min(status.st_size, max_bytes) + 1)


def _to_disk(path: Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno not in NO_FSYNC:
      raise
  finally:
    os.close(descriptor)
