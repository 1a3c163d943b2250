"""Names of files as text and as bytes, the same whatever the locale of a process.

A name is text in which a byte that is not UTF-8 is a lone surrogate (PEP 383). Python's
own text of a name depends on the locale: with LANG=C, it may decode ASCII alone.
"""

from __future__ import annotations

import os


def from_path(path: str) -> str:
  """Returns the name of a path or of a part of a path."""
  return from_bytes(os.fsencode(path))


def to_path(name: str) -> str:
  """Returns the path that has this name, in Python's text of paths."""
  return os.fsdecode(to_bytes(name))


def from_bytes(data: bytes) -> str:
  """Returns the name that these bytes hold."""
  return data.decode("utf-8", "surrogateescape")


def to_bytes(name: str) -> bytes:
  """Returns the bytes of a name; names are sorted by their bytes."""
  return name.encode("utf-8", "surrogateescape")


def is_utf8(path: str) -> bool:
  """Whether the bytes of a path are UTF-8."""
  try:
    os.fsencode(path).decode("utf-8")
  except UnicodeDecodeError:
    return False
  return True
