"""Steps whose loss or gradient is not finite: counted, and too many stop the run."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from mdt_jax.atomic import write_json
from mdt_jax.data.loader import batch_indices
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger
from mdt_jax.settings import Settings
from mdt_jax.training.step import Metrics

DIAGNOSIS = "diagnosis.json"  # in the workdir
STEPS_BEHIND = 8  # of the devices, so that looking does not make them wait


class SkippedStep(NamedTuple):
  step: int  # counted from 0; its draws follow from (seed, step)
  batch: int  # of the data, counted from 0


class SkippedSteps:
  """Counts skipped steps, some steps later, so that the devices do not wait.

  Args:
    settings: of the run; more than `settings.max_skipped` steps are too many.
    workdir: takes the diagnosis.
    num_examples: of the data.
  """

  def __init__(self, settings: Settings, workdir: Path, num_examples: int):
    self._settings = settings
    self._path = workdir / DIAGNOSIS
    self._num_examples = num_examples
    self.forget()

  def forget(self) -> None:
    """Counts from zero, as after going back to a checkpoint."""
    self._pending: collections.deque[tuple[SkippedStep, jax.Array]]
    self._pending = collections.deque()
    self._found: list[SkippedStep] = []

  def add(self, step: int, batch: int, metrics: Metrics) -> None:
    """Takes the metrics of a step, see `SkippedStep`."""
    self._pending.append((SkippedStep(step, batch), metrics["skipped"]))
    while len(self._pending) > STEPS_BEHIND:
      self._look()

  def look_at_all(self) -> None:
    """Waits for the devices, for the last steps of a run."""
    while self._pending:
      self._look()

  @property
  def too_many(self) -> bool:
    return len(self._found) > self._settings.max_skipped

  @property
  def first(self) -> int:
    """The first step that was skipped."""
    return self._found[0].step

  def stop(self, last_saved: int | None) -> NoReturn:
    """Writes the diagnosis and raises SettingError.

    Args:
      last_saved: steps of the last checkpoint.
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
      write_json(self._path, found)
    steps = ", ".join(str(skipped.step) for skipped in self._found)
    batches = ", ".join(str(skipped.batch) for skipped in self._found)
    raise SettingError(
      "config.max_skipped",
      settings.max_skipped,
      f"the loss or gradient of steps {steps} (batches {batches}) was not finite; the "
      f"last checkpoint is of step {last_saved}; config and examples are in "
      f"{self._path}; --replay_step={self.first} looks into the first one",
    )

  def _look(self) -> None:
    skipped, count = self._pending.popleft()
    if jax.device_get(count)[0] > 0:
      self._found.append(skipped)
      logger.warning(
        "step %d is skipped: its loss or gradient is not finite (batch %d)", *skipped
      )
