"""When to retry a save that failed, and when to give up."""

from __future__ import annotations

import math
import time
from pathlib import Path

from mdt_jax.logs import logger

FIRST_PAUSE = 10  # seconds after a save that failed; doubled each time


class SaveError(Exception):
  """A checkpoint cannot be saved, however often the save is retried."""


class Retries:
  """Counts saves that fail in a row, and says when to retry.

  Args:
    folder: of the checkpoints, for messages.
    max_failures: saves in a row that may fail before `failed` raises SaveError.
  """

  def __init__(self, folder: Path, max_failures: int):
    self._folder = folder
    self._max_failures = max_failures
    self._failures = 0
    self._not_before = -math.inf  # of the monotonic clock
    self.step: int | None = None  # of the last save, where it failed

  @property
  def is_due(self) -> bool:
    """Whether there is a failed save whose pause is over."""
    return self.step is not None and time.monotonic() >= self._not_before

  def succeeded(self) -> None:
    self._failures = 0
    self.step = None

  def failed(self, step: int, reason: str) -> None:
    """Logs the failure and doubles the pause.

    Raises:
      SaveError: too many saves failed in a row.
    """
    self._failures += 1
    self.step = step
    if self._failures >= self._max_failures:
      raise SaveError(
        f"{self._folder}: {self._failures} saves in a row failed, the last of step "
        f"{step}: {reason}"
      )
    pause = FIRST_PAUSE * 2 ** (self._failures - 1)
    self._not_before = time.monotonic() + pause
    logger.error(
      "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s. Training goes on; saves are retried "
      "after %d s (failure %d of %d)",
      step,
      reason,
      pause,
      self._failures,
      self._max_failures,
    )

  def wait(self) -> None:
    """Sleeps until the next retry is due."""
    time.sleep(max(0.0, self._not_before - time.monotonic()))
