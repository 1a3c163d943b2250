"""Steps whose loss or gradient is not finite: counted, and too many stop the run."""

from __future__ import annotations

import collections
import json
import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mdt_jax.data.loader import batch_indices
from mdt_jax.errors import SettingError
from mdt_jax.training.step import Metrics

DIAGNOSIS = "diagnosis.json"  # in the workdir
STEPS_BEHIND = 8  # of the devices, so that looking does not make them wait

logger = logging.getLogger("mdt_jax")


class SkippedSteps:
  """Looks at the metric "skipped" of each step, some steps later.

  Args:
    config: of the run; `config.max_skipped` steps may be skipped in one start.
    workdir: takes the diagnosis.
    num_examples: of the data.
  """

  def __init__(self, config: ConfigDict, workdir: Path, num_examples: int):
    self._config = config
    self._path = workdir / DIAGNOSIS
    self._num_examples = num_examples
    self._pending: collections.deque[tuple[int, jax.Array]] = collections.deque()
    self._steps: list[int] = []

  def add(self, n: int, metrics: Metrics, last_saved: int | None) -> None:
    """Takes the metrics of step n, counted from 0.

    Args:
      n: the step; its draws and its batch follow from (config.seed, n).
      metrics: of the step.
      last_saved: steps of the last checkpoint.

    Raises:
      SettingError: more than config.max_skipped steps were skipped; config, steps and
        the batches' examples are in diagnosis.json.
    """
    self._pending.append((n, metrics["skipped"]))
    while len(self._pending) > STEPS_BEHIND:
      n, skipped = self._pending.popleft()
      if jax.device_get(skipped)[0] > 0:
        self._steps.append(n)
        logger.warning("step %d is skipped: its loss or gradient is not finite", n)
    if len(self._steps) > self._config.max_skipped:
      self._stop(last_saved)

  def _stop(self, last_saved: int | None) -> None:
    examples = {
      n: batch_indices(
        self._num_examples, self._config.seed, self._config.batch_size, n
      )
      for n in self._steps
    }
    if jax.process_index() == 0:
      found = {
        "config": self._config.to_dict(),
        "skipped_steps": self._steps,
        "examples": examples,
        "last_checkpoint": last_saved,
      }
      self._path.write_text(json.dumps(found, indent=2) + "\n")
    shown = ", ".join(map(str, self._steps))
    raise SettingError(
      "config.max_skipped",
      self._config.max_skipped,
      f"the loss or gradient of steps {shown} was not finite; the last checkpoint is "
      f"of step {last_saved}; examples of these steps and config are in {self._path}",
    )
