"""The logger of the package; commands format its lines, see `mdt_jax.cli`."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdt_jax")


def counted(count: int, noun: str, plural: str | None = None) -> str:
  """A number and its noun: "1 image", "3 images", "1,000 classes"; for log lines."""
  return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
  r"""A text that every terminal, font and file can hold: "\udce9" for a lone surrogate.

  Python represents the bytes of a file name that are not UTF-8 by lone surrogates.
  """
  return text.encode("utf-8", "backslashreplace").decode("utf-8")
