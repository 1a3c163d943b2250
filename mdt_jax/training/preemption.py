"""Stopping a run after the current step: Ctrl-C, preemption, or a closed terminal."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator

from mdt_jax.exit_codes import EXIT_TRY_AGAIN
from mdt_jax.logs import logger

# SIGHUP: the terminal, or the ssh session, of the run was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
  """The run was asked to stop, and its state is saved.

  Args:
    message: text of the error.
    signals: numbers of the signals that this process received; empty if another process
      of the run received the signal.
  """

  def __init__(self, message: str, signals: list[int]):
    super().__init__(message)
    self.signals = signals


@contextlib.contextmanager
def stop_signals(grace_seconds: float = math.inf) -> Iterator[list[int]]:
  """Yields a list that collects the numbers of received signals of `SIGNALS`.

  A signal that the process ignores stays ignored, such as SIGHUP under nohup, or SIGINT
  of a command that a script started in the background. The block reads the list and
  ends by itself. A second signal has its usual effect and
  ends the process at once. In other threads than the main thread the list stays empty.

  Args:
    grace_seconds: time from the first signal until the process exits with
      `EXIT_TRY_AGAIN`, even if the state is not saved. The last finished checkpoint
      stays intact.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # Python allows signal handlers in the main thread only
    return

  def end() -> None:
    logger.error(
      "config.grace_seconds = %g have passed, the state is not saved: exiting",
      grace_seconds,
    )
    os._exit(EXIT_TRY_AGAIN)

  def restore(*numbers: int) -> None:
    for number in before.keys() & numbers:
      # None: a handler that was not installed from Python; jax.distributed sets one.
      handler = before[number]
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  timer = threading.Timer(min(grace_seconds, threading.TIMEOUT_MAX), end)
  timer.daemon = True

  def handle(number: int, frame: object) -> None:
    received.append(number)
    if len(received) > 1:  # a second signal that came while this function ran
      return
    if signal.SIGHUP in before:  # a closed terminal sends SIGHUP twice
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
    restore(signal.SIGINT, signal.SIGTERM)
    timer.start()
    logger.info(
      "%s: saving and stopping after this step; send the signal again to stop without "
      "saving",
      signal.Signals(number).name,
    )

  before = {
    number: signal.signal(number, handle)
    for number in SIGNALS
    if signal.getsignal(number) != signal.SIG_IGN
  }
  try:
    yield received
  finally:
    timer.cancel()
    restore(*SIGNALS)
