"""The logger of the package; commands format its lines, see `mdt_jax.cli`."""

from __future__ import annotations

import logging

logger = logging.getLogger("mdt_jax")


def counted(count: int, noun: str) -> str:
  """A number and its noun: "1 image", "3 images"; for log lines."""
  return f"{count} {noun}{'' if count == 1 else 's'}"
