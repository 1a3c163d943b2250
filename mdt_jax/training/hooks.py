"""Hooks that run at regular intervals of training, and the hook of the scores.

`sample_pictures` has the hook of the pictures.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mdt_jax.atomic import write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Stopped
from mdt_jax.logs import logger
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.progress import is_due
from mdt_jax.types import Params

# (steps done, averaged parameters by decay, stops) -> scores by TensorBoard tag.
# stops() is True once the run is asked to stop.
Evaluate = Callable[[int, Mapping[str, Params], Callable[[], bool]], dict[str, float]]


class Hook(abc.ABC):
  """Computes and writes a result from the averaged parameters.

  A hook runs every `every` steps and after the last step. All processes of a run
  compute the result together, and process 0 writes it. Training continues after a hook
  that fails; with several processes, only if the failure is a SettingError.

  Attributes:
    what: name of the result, for messages.
    is_long: whether to save the state before the hook runs, because the run may be
      asked to stop during the hook.

  Args:
    every: steps between two calls; 0 disables the hook.
    num_steps: number of steps of the run.
    folder: folder of the results; the file of step N is step_N.SUFFIX.
    suffix: file name extension, without a dot.
  """

  what: str
  is_long = False

  def __init__(self, every: int, num_steps: int, folder: AnyPath, suffix: str):
    self._every, self._num_steps = every, num_steps
    self._folder, self._suffix = folder, suffix

  @abc.abstractmethod
  def _make(self, done: int, ema: Mapping[str, Any], stops: Callable[[], bool]) -> Any:
    """Computes the result; other processes than 0 may return None."""

  @abc.abstractmethod
  def _write(self, path: AnyPath, made: Any) -> None:
    """Writes the result `made` to a file."""

  @abc.abstractmethod
  def _log(self, done: int, made: Any, events: Events) -> None:
    """Writes the result `made` to TensorBoard."""

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    events: Events,
    stops: Callable[[], bool],
  ) -> None:
    """Computes the result, writes the file and logs the result to TensorBoard.

    Args:
      done: number of training steps done.
      ema: averaged parameters by decay, `TrainState.ema`.
      events: writer for TensorBoard.
      stops: returns whether the run is asked to stop; the answer is the same on all
        processes.

    Raises:
      Stopped: the run was asked to stop before the result was complete.
    """
    try:
      made = self._make(done, ema, stops)
    except Stopped:
      if jax.process_index() == 0:  # the next start of the run tries again
        with tolerate(f"{self.what} of step {done}"):
          self._tried(done).unlink(missing_ok=True)
      raise
    except Exception as error:
      is_of_setting = isinstance(error, SettingError)
      if jax.process_count() > 1 and not is_of_setting:
        raise  # if only this process failed, the other processes would wait forever
      logger.error(
        "NO %s OF STEP %d: %s. Training continues",
        self.what.upper(),
        done,
        error,
        exc_info=not is_of_setting,
      )
      return
    if jax.process_index() > 0:
      return
    with tolerate(f"{self.what} of step {done}"):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._write(self._path(done), made)
      self._tried(done).unlink(missing_ok=True)
    self._log(done, made, events)

  def is_due(self, done: int) -> bool:
    """Whether the hook runs after `done` steps."""
    return 0 < done <= self._num_steps and is_due(done, self._every, self._num_steps)

  def is_missing(self, done: int) -> bool:
    """Whether the result of step `done` is due but has no file.

    A resumed run calls this function for its first step. A marker file (`_tried`)
    limits the run to one retry: if the hook ends the process again, for example because
    memory runs out, the next start skips the result.
    """
    is_missing = self.is_due(done) and not self._path(done).exists()
    if is_missing and jax.process_index() == 0:
      if self._tried(done).exists():
        logger.warning(
          "no %s of step %d: the run ended twice while computing the %s",
          self.what,
          done,
          self.what,
        )
        is_missing = False
      else:
        with tolerate(f"{self.what} of step {done}"):
          self._folder.mkdir(parents=True, exist_ok=True)
          self._tried(done).touch()
    if jax.process_count() > 1:  # a shared folder may differ between hosts for a while
      is_missing = bool(multihost_utils.broadcast_one_to_all(np.array(is_missing)))
    return is_missing

  def _path(self, done: int) -> AnyPath:
    """The file of the result after `done` steps."""
    return self._folder / f"step_{done:07d}.{self._suffix}"

  def _tried(self, done: int) -> AnyPath:
    """The marker file of a retry, see `is_missing`."""
    return self._folder / f".step_{done:07d}.tried"


class Scores(Hook):
  """Computes scores of sampled images and writes them to WORKDIR/scores/step_N.json.

  Args:
    every, num_steps, folder: see `Hook`.
    evaluate: computes the scores; see `Evaluate`.
  """

  what = "scores"
  is_long = True

  def __init__(self, every: int, num_steps: int, folder: AnyPath, evaluate: Evaluate):
    super().__init__(every, num_steps, folder, "json")
    self._evaluate = evaluate

  def _make(
    self, done: int, ema: Mapping[str, Params], stops: Callable[[], bool]
  ) -> dict[str, float]:
    return self._evaluate(done, ema, stops)

  def _write(self, path: AnyPath, made: dict[str, float]) -> None:
    write_json(path, made)

  def _log(self, done: int, made: dict[str, float], events: Events) -> None:
    events.write_scalars(done, made)
