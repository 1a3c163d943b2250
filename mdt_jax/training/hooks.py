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
from PIL import Image

from mdt_jax import factories, sharding
from mdt_jax.atomic import write_json
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Evaluator, Stopped
from mdt_jax.sampling import batches, pictures
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.progress import is_due

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

logger = logging.getLogger("mdt_jax")


class Periodic(abc.ABC):
  """What is made of the averaged parameters every so many steps, and after the last.

  A run goes on where it fails. Of several processes all must take part, and the first
  one writes.

  Attributes:
    what: its name, for messages.
    is_long: a stop is likely to be asked for meanwhile: the state is saved first.
  """

  what: str
  is_long = False

  def __init__(self, every: int, num_steps: int, folder: Path, suffix: str):
    self._every, self._num_steps = every, num_steps
    self._folder, self._suffix = folder, suffix

  @abc.abstractmethod
  def _make(self, done: int, ema: Mapping[str, Any], stops: Callable[[], bool]) -> Any:
    """Makes it, or None on a process that does not write; see `__call__`."""

  @abc.abstractmethod
  def _write(self, path: Path, made: Any) -> None:
    """Writes it to its file."""

  @abc.abstractmethod
  def _log(self, done: int, made: Any, events: Events) -> None:
    """Shows it in TensorBoard."""

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
    try:
      made = self._make(done, ema, stops)
    except Stopped:
      if jax.process_index() == 0:  # to be made at the next start, as often as it takes
        self._tried(done).unlink(missing_ok=True)
      raise
    except Exception as error:
      is_of_setting = isinstance(error, SettingError)
      if jax.process_count() > 1 and not is_of_setting:
        raise  # it may be of this process alone, and the others wait for it
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
    """Whether a start at this step has to make it: the one before ended meanwhile.

    Once: where making it ends this start too, the next one goes on without.
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
    """There while a start makes up for it."""
    return self._folder / f".step_{done:07d}.tried"


class Pictures(Periodic):
  """Draws config.num_samples images, for a look."""

  what = "picture"

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
    self._generator = batches.make_generator(config)
    self._decay = str(factories.sampled_decay(config))
    shards = sharding.batch_shards(mesh)
    count = -(-config.num_samples // shards) * shards
    self._labels = np.arange(count) % config.model.num_classes

  def _make(
    self, done: int, ema: Mapping[str, Any], stops: Callable[[], bool]
  ) -> Image.Image | None:
    del done, stops  # it is one call of a compiled function
    config, labels = self._config, self._labels
    (arrays,) = batches.generate_batches(
      self._generator,
      ema[self._decay],
      labels,
      seed=config.seed,
      batch_size=len(labels),
    )
    if self._autoencoder is not None:
      arrays = sharding.fetch(self._autoencoder.decode(arrays))
    if jax.process_index() > 0:
      return None
    is_pixels = self._autoencoder is not None or factories.holds_pixels(config)
    convert = pictures.to_uint8 if is_pixels else pictures.latent_preview
    captions = [str(label) for label in labels[: config.num_samples]]
    return pictures.make_grid(convert(arrays[: config.num_samples]), captions)

  def _write(self, path: Path, made: Image.Image) -> None:
    made.save(path)

  def _log(self, done: int, made: Image.Image, events: Events) -> None:
    events.write_images(done, {"samples": np.asarray(made)[None]})


class Scores(Periodic):
  """Scores as config.eval says.

  Args:
    config: of the run.
    workdir: of the run.
    evaluate: None where config.eval.every is 0.
  """

  what = "scores"
  is_long = True

  def __init__(self, config: ConfigDict, workdir: Path, evaluate: Evaluator | None):
    super().__init__(config.eval.every, config.num_steps, workdir / "scores", "json")
    self._evaluate = evaluate

  def _make(
    self, done: int, ema: Mapping[str, Any], stops: Callable[[], bool]
  ) -> dict[str, float]:
    return self._evaluate(done, ema, stops)

  def _write(self, path: Path, made: dict[str, float]) -> None:
    write_json(path, made)

  def _log(self, done: int, made: dict[str, float], events: Events) -> None:
    events.write_scalars(done, made)
