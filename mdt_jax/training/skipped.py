"""Counts skipped steps, and stops the run after too many.

The training step skips the update if the loss or the gradient is not finite.
"""

from __future__ import annotations

import collections
from typing import NamedTuple, NoReturn

import jax

from mdt_jax.atomic import write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.data.loader import batch_indices
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger
from mdt_jax.settings import Settings
from mdt_jax.training.events import tolerate
from mdt_jax.training.step import Metrics

DIAGNOSIS = "diagnosis.json"  # in the workdir
STEPS_BEHIND = 8  # delay of the count, so that the devices need not wait for the host


class SkippedStep(NamedTuple):
  """Which step was skipped.

  Attributes:
    step: number of the step, from 0; the random numbers derive from (seed, step).
    batch: number of the batch, from 0.
  """

  step: int
  batch: int


class SkippedSteps:
  """Counts skipped steps, with a delay of `STEPS_BEHIND` steps.

  Args:
    settings: settings of the run; more than `settings.max_skipped` steps are too many.
    workdir: folder of diagnosis.json.
    num_examples: number of examples in the training data.
  """

  def __init__(self, settings: Settings, workdir: AnyPath, num_examples: int):
    self._settings = settings
    self._path = workdir / DIAGNOSIS
    self._num_examples = num_examples
    self.forget()

  def forget(self) -> None:
    """Resets the count to zero, when the run returns to a checkpoint."""
    self._pending: collections.deque[tuple[SkippedStep, jax.Array]]
    self._pending = collections.deque()
    self._found: list[SkippedStep] = []

  def add(self, step: int, batch: int, metrics: Metrics) -> None:
    """Adds the metrics of a step.

    Args:
      step, batch: see `SkippedStep`.
      metrics: metrics of the step; "skipped" counts.
    """
    self._pending.append((SkippedStep(step, batch), metrics["skipped"]))
    while len(self._pending) > STEPS_BEHIND:
      self._look()

  def look_at_all(self) -> None:
    """Counts all steps added so far; waits for the devices."""
    while self._pending:
      self._look()

  @property
  def too_many(self) -> bool:
    """Whether more than `settings.max_skipped` steps were skipped."""
    return len(self._found) > self._settings.max_skipped

  @property
  def first(self) -> int:
    """Number of the first skipped step."""
    return self._found[0].step

  def stop(self, last_saved: int | None) -> NoReturn:
    """Writes diagnosis.json and raises SettingError.

    Args:
      last_saved: step of the last checkpoint, or None.
    """
    settings = self._settings
    if jax.process_index() == 0:
      found = {
        "config": settings.to_dict(),
        "skipped": [
          skipped._asdict()
          | {
            "examples": batch_indices(
              self._num_examples, settings.seed, settings.batch_size, skipped.batch
            )
          }
          for skipped in self._found
        ],
        "last_checkpoint": last_saved,
      }
      with tolerate(DIAGNOSIS):  # the error below matters more
        write_json(self._path, found)
    steps = ", ".join(str(skipped.step) for skipped in self._found)
    batches = ", ".join(str(skipped.batch) for skipped in self._found)
    raise SettingError(
      "config.max_skipped",
      settings.max_skipped,
      f"steps {steps} (batches {batches}) were skipped: their loss or gradient was not "
      f"finite; the last checkpoint is at step {last_saved}; {self._path} lists the "
      f"examples; --replay_step={self.first} examines the first skipped step",
    )

  def _look(self) -> None:
    """Counts and logs the oldest pending step if the step was skipped."""
    skipped, count = self._pending.popleft()
    if jax.device_get(count)[0] > 0:
      self._found.append(skipped)
      logger.warning(
        "step %d (batch %d) is skipped: the loss or gradient is not finite", *skipped
      )
