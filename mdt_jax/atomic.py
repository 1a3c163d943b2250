"""Files that are there as a whole or not at all, however the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path, writer: str = "") -> Iterator[Path]:
  """Gives a path beside `path` to write to, and renames it where all went well.

  Args:
    path: of the file; its folder is made if need be.
    writer: tells apart those who may write the file at the same time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}{writer}.partial")
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes JSON, whole or not at all; processes may do so at the same time."""
  with whole(path, f".{secrets.token_hex(4)}") as partial:  # hosts share process ids
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
