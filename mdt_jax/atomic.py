"""Atomic writing of files: a reader sees the old or the new file, never a part.

This holds after a power cut too: the contents reach the disk before the name does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Errors of file systems that cannot wait, such as some network file systems.
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
  """Yields a temporary path, and renames the file there to `path` on success.

  If the body raises an exception, the temporary file is deleted and `path` remains
  unchanged.

  Args:
    path: path of the file; its folder is created if needed.
    writer: suffix of the temporary name; must be unique if several writers of `path`
      can run at the same time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}{writer}.partial")
  try:
    yield partial
    _to_disk(partial)
    os.replace(partial, path)
    _to_disk(path.parent)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as JSON atomically, even if several processes write `path`."""
  unique = f".{secrets.token_hex(4)}"  # process ids are not unique across hosts
  with atomic_write(path, unique) as partial:
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
