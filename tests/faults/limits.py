"""Runs a command with limited memory and time.

A forked process imports the module of its function. This module imports little. The
tests of command lines import PyTorch, which takes several seconds.
"""

from __future__ import annotations

import resource

from tests import forked

# A command that takes longer hangs.
CPU_SECONDS = 60
MEMORY = 20 * 2**30  # bytes of addresses; a network takes a thousandth of it


def limited(*arguments: str) -> None:
  """Runs a module, given with its flags, as python -m does."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
  forked.run_module(*arguments)
