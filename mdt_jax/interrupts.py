"""Ctrl-C and SIGTERM end a command with one line, also while it imports its modules.

The commands import this module first. To import it elsewhere has no effect.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN


def handle_sigterm() -> None:
  """Makes SIGTERM end the process with one line and `EXIT_TRY_AGAIN`.

  In other threads than the main thread, Python allows no signal handlers.
  """
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, _end)


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
  signal.signal(signal.SIGINT, _end)  # until `cli.run`
