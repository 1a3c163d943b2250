"""Hooks: pictures and scores of the averaged parameters, every so many steps."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from mdt_jax import sharding
from mdt_jax.atomic import write_json
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Stopped
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import generate_batches
from mdt_jax.sampling.generator import make_generator
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.progress import is_due
from mdt_jax.types import Params

# (steps done, averages by decay, whether to stop) -> scores by TensorBoard tag
Evaluate = Callable[[int, Mapping[str, Params], Callable[[], bool]], dict[str, float]]


class Hook(abc.ABC):
  """Makes something of the averaged parameters every so many steps, and after the last.

  The run goes on where that fails. With several processes all take part, and the first
  one writes.

  Attributes:
    what: name of what is made, for messages.
    is_long: whether the state is saved first, as a stop is likely meanwhile.
  """

  what: str
  is_long = False

  def __init__(self, every: int, num_steps: int, folder: Path, suffix: str):
    self._every, self._num_steps = every, num_steps
    self._folder, self._suffix = folder, suffix

  @abc.abstractmethod
  def _make(self, done: int, ema: Mapping[str, Any], stops: Callable[[], bool]) -> Any:
    """Makes the picture or scores; None on a process that does not write."""

  @abc.abstractmethod
  def _write(self, path: Path, made: Any) -> None:
    """Writes what was made to its file."""

  @abc.abstractmethod
  def _log(self, done: int, made: Any, events: Events) -> None:
    """Shows what was made in TensorBoard."""

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    events: Events,
    stops: Callable[[], bool],
  ) -> None:
    """Makes, writes and shows it.

    Args:
      done: steps done.
      ema: averaged parameters by decay, of a `TrainState`.
      events: for TensorBoard.
      stops: whether the run is asked to stop, the same on every process.

    Raises:
      Stopped: the run is asked to stop.
    """
    try:
      made = self._make(done, ema, stops)
    except Stopped:
      if jax.process_index() == 0:  # so the next start makes it
        self._tried(done).unlink(missing_ok=True)
      raise
    except Exception as error:
      is_of_setting = isinstance(error, SettingError)
      if jax.process_count() > 1 and not is_of_setting:
        raise  # this process may be the only one that fails, and the others would wait
      logger.error(
        "NO %s OF STEP %d: %s. The run goes on",
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
    return 0 < done <= self._num_steps and is_due(done, self._every, self._num_steps)

  def is_missing(self, done: int) -> bool:
    """Whether a start at this step has to make what the last start did not finish.

    It is tried once: where making it ends this start too, the next one goes on without.
    """
    is_missing = self.is_due(done) and not self._path(done).exists()
    if is_missing and jax.process_index() == 0:
      if self._tried(done).exists():
        logger.warning("no %s of step %d: two starts ended there", self.what, done)
        is_missing = False
      else:
        with tolerate(f"{self.what} of step {done}"):
          self._folder.mkdir(parents=True, exist_ok=True)
          self._tried(done).touch()
    if jax.process_count() > 1:  # they may see the folder at different times
      is_missing = bool(multihost_utils.broadcast_one_to_all(np.array(is_missing)))
    return is_missing

  def _path(self, done: int) -> Path:
    return self._folder / f"step_{done:07d}.{self._suffix}"

  def _tried(self, done: int) -> Path:
    """A file that exists while a start makes what the last start did not finish."""
    return self._folder / f".step_{done:07d}.tried"


class Pictures(Hook):
  """Draws `settings.num_samples` images, to look at."""

  what = "picture"

  def __init__(self, experiment: Experiment, folder: Path):
    settings = experiment.settings
    super().__init__(settings.sample_every, settings.num_steps, folder, "png")
    self._settings = settings
    self._autoencoder = experiment.autoencoder
    self._draws_pixels = self._autoencoder is not None or experiment.holds_pixels
    self._generator = make_generator(experiment.model, experiment.sampler)
    shards = sharding.batch_shards(experiment.mesh)
    count = -(-settings.num_samples // shards) * shards
    self._labels = experiment.model.conditioning.choose(count)

  def _make(
    self, done: int, ema: Mapping[str, Params], stops: Callable[[], bool]
  ) -> Image.Image | None:
    del done, stops  # it is one call of a compiled function
    settings, labels = self._settings, self._labels
    (arrays,) = generate_batches(
      self._generator,
      ema[str(settings.sampled_decay)],
      labels,
      seed=settings.seed,
      batch_size=len(labels),
    )
    if self._autoencoder is not None:
      arrays = sharding.fetch(self._autoencoder.decode(arrays))
    if jax.process_index() > 0:
      return None
    convert = pictures.to_uint8 if self._draws_pixels else pictures.latent_preview
    captions = [str(label) for label in labels[: settings.num_samples]]
    return pictures.make_grid(convert(arrays[: settings.num_samples]), captions)

  def _write(self, path: Path, made: Image.Image) -> None:
    made.save(path)

  def _log(self, done: int, made: Image.Image, events: Events) -> None:
    events.write_images(done, {"samples": np.asarray(made)[None]})


class Scores(Hook):
  """Scores of sampled images."""

  what = "scores"
  is_long = True

  def __init__(self, every: int, num_steps: int, folder: Path, evaluate: Evaluate):
    super().__init__(every, num_steps, folder, "json")
    self._evaluate = evaluate

  def _make(
    self, done: int, ema: Mapping[str, Params], stops: Callable[[], bool]
  ) -> dict[str, float]:
    return self._evaluate(done, ema, stops)

  def _write(self, path: Path, made: dict[str, float]) -> None:
    write_json(path, made)

  def _log(self, done: int, made: dict[str, float], events: Events) -> None:
    events.write_scalars(done, made)
