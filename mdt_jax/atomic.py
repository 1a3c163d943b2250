"""Writes files atomically: a reader sees the old file or the new one, never a part."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[Path]:
  """Yields a temporary path beside `path`, and renames it to `path` on success.

  An exception in the body removes the temporary file and leaves `path` as it was.

  Args:
    path: of the file; its folder is created if needed.
    writer: a suffix of the temporary name, for writers of `path` that may run at the
      same time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}{writer}.partial")
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes JSON atomically; several processes may write `path` at the same time."""
  unique = f".{secrets.token_hex(4)}"  # process ids repeat across hosts
  with atomic_write(path, unique) as partial:
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
