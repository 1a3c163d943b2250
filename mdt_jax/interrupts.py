"""Ctrl-C and SIGTERM end a command with one line, also while it imports its modules.

The commands import this module first. Importing it elsewhere has no effect.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN


def raise_on_sigint() -> None:
  """Makes SIGINT raise KeyboardInterrupt again, as Python does by default."""
  _handle(signal.SIGINT, signal.default_int_handler)


def handle_sigterm() -> None:
  """Makes SIGTERM end the process with one line and `EXIT_TRY_AGAIN`."""
  _handle(signal.SIGTERM, _end)


def _handle(number: int, handler: Callable[[int, Any], Any]) -> None:
  """Sets the handler of a signal, unless the process ignores the signal.

  Shells start background commands with SIGINT ignored. In other threads than the main
  thread, Python allows no signal handlers.
  """
  is_main = threading.current_thread() is threading.main_thread()
  if is_main and signal.getsignal(number) != signal.SIG_IGN:
    signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
  """Ends the process at once; the command resumes when it is repeated."""
  del frame
  if number == signal.SIGINT:
    text, code = "interrupted", EXIT_INTERRUPTED
  else:
    name = signal.Signals(number).name
    text, code = f"stopped by {name}; repeat the command", EXIT_TRY_AGAIN
  os.write(2, f"{text}\n".encode())
  os._exit(code)


def _is_command() -> bool:
  """Whether the process runs a command of the package, as in python -m mdt_jax.main."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  is_child = multiprocessing.parent_process() is not None
  return spec is not None and spec.name.startswith("mdt_jax.") and not is_child


if _is_command():
  handle_sigterm()
  _handle(signal.SIGINT, _end)  # until `cli.run`
