"""Decides when to retry a failed save, and when to stop the run."""

from __future__ import annotations

import math
import time

from mdt_jax.buckets import AnyPath
from mdt_jax.logs import logger

FIRST_PAUSE = 10  # seconds until the first retry; doubles with each failure


class SaveError(Exception):
  """Too many saves of a run failed in a row."""


class Retries:
  """Counts failed saves, and doubles the pause before each retry.

  Args:
    folder: folder of the checkpoints, for messages.
    max_failures: number of failures in a row at which `failed` raises SaveError.

  Attributes:
    step: step of the last save if the save failed, else None.
  """

  def __init__(self, folder: AnyPath, max_failures: int):
    self._folder = folder
    self._max_failures = max_failures
    self._failures = 0
    self._not_before = -math.inf  # time.monotonic() of the next retry
    self.step: int | None = None

  @property
  def is_due(self) -> bool:
    """Whether the last save failed and the pause before the retry is over."""
    return self.step is not None and time.monotonic() >= self._not_before

  def succeeded(self) -> None:
    """Resets the count after a save that succeeded."""
    self._failures = 0
    self.step = None

  def failed(self, step: int, reason: str) -> None:
    """Counts and logs a failed save, and starts the pause before the retry.

    Args:
      step: step of the save.
      reason: error message of the save.

    Raises:
      SaveError: `max_failures` saves failed in a row.
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
      "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s. Training continues; the next try is "
      "in %d s (failure %d of %d)",
      step,
      reason,
      pause,
      self._failures,
      self._max_failures,
    )

  def wait(self) -> None:
    """Sleeps until the next retry is due."""
    time.sleep(max(0.0, self._not_before - time.monotonic()))
