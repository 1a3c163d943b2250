"""The logger of the package, and the format of its lines."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("mdt_jax")


def print_log_lines() -> None:
  """Prints the package's log lines to standard output, without a prefix.

  Commands and notebooks call `print_log_lines`. The log lines of other libraries stay
  as they are.
  """
  logger.setLevel(logging.INFO)
  logger.propagate = False  # a handler of the root logger would print each line again
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger.handlers = [handler]


def counted(count: int, noun: str, plural: str | None = None) -> str:
  """A number and its noun: "1 image", "3 images", "1,000 classes"; for log lines."""
  return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
  r"""A text that every terminal, font and file can hold: "\udce9" for a lone surrogate.

  Python represents the bytes of a file name that are not UTF-8 by lone surrogates.
  """
  return text.encode("utf-8", "backslashreplace").decode("utf-8")
