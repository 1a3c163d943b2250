"""Pictures and scores of the averaged parameters, every so many steps."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.during_training import Evaluator, Stopped
from mdt_jax.generation import generate, images
from mdt_jax.training import sharding
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.progress import is_due
from mdt_jax.writing import write_json

if TYPE_CHECKING:
  from mdt_jax.data.autoencoder import Autoencoder

logger = logging.getLogger("mdt_jax")


class Periodic(abc.ABC):
  """What is made of the averaged parameters every so many steps, and after the last.

  Of several processes all must take part, and the first one writes.

  Attributes:
    is_long: a stop is likely to be asked for meanwhile: the state is saved first.
  """

  is_long = False

  def __init__(self, every: int, num_steps: int, folder: Path, suffix: str):
    self._every, self._num_steps = every, num_steps
    self._folder, self._suffix = folder, suffix

  @abc.abstractmethod
  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    events: Events,
    stops: Callable[[], bool],
  ) -> None:
    """Makes and writes it.

    Args:
      done: steps done.
      ema: averaged parameters by decay, of a `TrainState`.
      events: take it too.
      stops: whether the run is asked to stop, the same on every process.

    Raises:
      Stopped: it is.
    """

  def is_due(self, done: int) -> bool:
    return 0 < done <= self._num_steps and is_due(done, self._every, self._num_steps)

  def is_missing(self, done: int) -> bool:
    """Whether it is due and not there, as where a run ended while it was made."""
    is_missing = self.is_due(done) and not self._path(done).exists()
    if jax.process_count() > 1:  # they may see the folder at different times
      is_missing = bool(multihost_utils.broadcast_one_to_all(np.array(is_missing)))
    return is_missing

  def _path(self, done: int) -> Path:
    return self._folder / f"step_{done:07d}.{self._suffix}"


class Pictures(Periodic):
  """Draws config.num_samples images, for a look."""

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh,
    workdir: Path,
    autoencoder: Autoencoder | None,
  ):
    every = config.sample_every if config.num_samples else 0
    super().__init__(every, config.num_steps, workdir / "samples", "png")
    self._config = config
    self._autoencoder = autoencoder
    self._generator = generate.make_generator(config)
    self._decay = str(factories.sampled_decay(config))
    shards = sharding.batch_shards(mesh)
    count = -(-config.num_samples // shards) * shards
    self._labels = np.arange(count) % config.model.num_classes

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    events: Events,
    stops: Callable[[], bool],
  ) -> None:
    config, labels = self._config, self._labels
    (arrays,) = generate.generate_batches(
      self._generator,
      ema[self._decay],
      labels,
      seed=config.seed,
      batch_size=len(labels),
    )
    if self._autoencoder is not None:
      arrays = sharding.fetch(self._autoencoder.decode(arrays))
    if jax.process_index() > 0:
      return
    is_pixels = self._autoencoder is not None or factories.holds_pixels(config)
    convert = images.to_uint8 if is_pixels else images.latent_preview
    captions = [str(label) for label in labels[: config.num_samples]]
    grid = images.make_grid(convert(arrays[: config.num_samples]), captions)
    with tolerate(f"the picture of step {done}"):
      self._folder.mkdir(parents=True, exist_ok=True)
      grid.save(self._path(done))
    events.write_images(done, {"samples": np.asarray(grid)[None]})


class Scores(Periodic):
  """Scores as config.eval says; a run goes on where they fail.

  Args:
    config: of the run.
    workdir: of the run.
    evaluate: None where config.eval.every is 0.
  """

  is_long = True

  def __init__(self, config: ConfigDict, workdir: Path, evaluate: Evaluator | None):
    super().__init__(config.eval.every, config.num_steps, workdir / "scores", "json")
    self._evaluate = evaluate

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    events: Events,
    stops: Callable[[], bool],
  ) -> None:
    try:
      found = self._evaluate(done, ema, stops)
    except Stopped:
      raise
    except Exception as error:
      is_of_setting = isinstance(error, SettingError)
      if jax.process_count() > 1 and not is_of_setting:
        raise  # it may be of this process alone, and the others wait for it
      logger.error(
        "STEP %d IS NOT SCORED: %s. Training goes on",
        done,
        error,
        exc_info=not is_of_setting,
      )
      return
    events.write_scalars(done, found)
    if jax.process_index() > 0:
      return
    with tolerate(f"the scores of step {done}"):
      write_json(self._path(done), found)
