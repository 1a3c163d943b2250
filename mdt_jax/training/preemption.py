"""A run that is asked to stop: by Ctrl-C, or by SIGTERM where it is preempted."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator

from mdt_jax.logs import logger
from mdt_jax.training import distributed


class Interrupted(Exception):
  """The run was asked to stop; its state is saved.

  Attributes:
    signals: that asked for the stop; none where another process was asked.
  """

  def __init__(self, message: str, signals: list[int]):
    super().__init__(message)
    self.signals = signals


@contextlib.contextmanager
def stop_signals(grace_seconds: float = math.inf) -> Iterator[list[int]]:
  """Collects SIGINT and SIGTERM in a list, which it yields; a second one acts at once.

  Args:
    grace_seconds: from the first signal until the process ends, saved or not; the last
      finished checkpoint exists in any case.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # only the main thread may handle signals
    return

  def end() -> None:
    logger.error("not saved within %g s: the process ends", grace_seconds)
    os._exit(distributed.EXIT_TRY_AGAIN)

  def restore() -> None:
    for number, handler in before.items():
      # None: a handler that is not Python's, as jax.distributed sets.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  timer = threading.Timer(min(grace_seconds, threading.TIMEOUT_MAX), end)
  timer.daemon = True

  def handle(number: int, frame: object) -> None:
    received.append(number)
    timer.start()
    logger.info("stopping after this step; once more to stop without saving")
    restore()

  before = {
    number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    timer.cancel()
    restore()
