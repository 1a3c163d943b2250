"""Scores of a network while it trains, as `config.eval` says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.data.sources import Source
from mdt_jax.evaluation import scores
from mdt_jax.evaluation.image_streams import (
  Batch,
  GeneratedImages,
  ImageStream,
  SourceImages,
)
from mdt_jax.evaluation.scores import Summary
from mdt_jax.pretrained.torch_inception import load_inception
from mdt_jax.sampling import batches

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

MAX_REAL_IMAGES = 10_000  # of the data, where no reference is given

logger = logging.getLogger("mdt_jax")


class Stopped(Exception):
  """The run is asked to stop: there are no scores of this step."""


class Evaluator:
  """Samples with the averaged parameters, and scores what comes out.

  Of several processes all must take part.

  Args:
    config: of the run.
    mesh: its devices, which share the work.
    source: its data, real images where `config.eval.reference` names none.
    autoencoder: decodes latents.

  Raises:
    SettingError: a file that is named cannot be used, images are missing, or a score
      cannot be had of those that will be drawn.
  """

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh,
    source: Source,
    autoencoder: Autoencoder | None = None,
  ):
    self._config = config
    self._autoencoder = autoencoder
    self._generator = batches.make_generator(config)
    self._names = factories.eval_metrics(config)
    drawn = self._drawn(params=None)
    inception = None
    if config.eval.inception is not None:
      inception = load_inception(config.eval.inception, "config.eval.inception")
    self._extract = scores.make_extractor(
      self._names, inception, config.eval.batch_size, mesh
    )
    self._real = self._read_real(source)
    scores.check_comparable(
      self._names,
      self._real,
      drawn.labels,
      self._extract.sizes(drawn.image_shape),
      number="config.eval.num_images",
      reference="config.eval.reference",
      path=config.eval.reference,
    )

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Any],
    stops: Callable[[], bool] = lambda: False,
  ) -> dict[str, float]:
    """Scores by the name of their TensorBoard tag, "eval/fid".

    Args:
      done: steps done.
      ema: averaged parameters by decay, of a `TrainState`.
      stops: asked after each batch, and the same on every process.

    Raises:
      Stopped: `stops` says so.
    """
    drawn = self._drawn(ema[str(factories.sampled_decay(self._config))])
    images = _UntilStopped(drawn, stops)
    generated = scores.summarize(images, self._extract, self._names)
    found = scores.score(self._names, self._real, generated)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
    logger.info("step %d  %s", done, shown)
    return {f"eval/{name}": value for name, value in found.items()}

  def _drawn(self, params: Any) -> GeneratedImages:
    return GeneratedImages(
      self._config,
      self._generator,
      params,
      self._config.eval.num_images,
      self._autoencoder,
      self._config.seed,
    )

  def _read_real(self, source: Source) -> Summary:
    names = scores.of_real_images(self._names)
    reference = self._config.eval.reference
    if names and reference is None:
      images = SourceImages(source, MAX_REAL_IMAGES, "config.eval.reference")
      return scores.summarize(images, self._extract, names)
    if names:
      return scores.read_reference(
        reference, names, self._extract, setting="config.eval.reference"
      )
    return Summary({}, {})


class _UntilStopped:
  """An `ImageStream` that raises `Stopped` between batches."""

  def __init__(self, images: ImageStream, stops: Callable[[], bool]):
    self._images, self._stops = images, stops

  def __len__(self) -> int:
    return len(self._images)

  def batches(self, batch_size: int) -> Iterator[Batch]:
    for batch in self._images.batches(batch_size):
      if self._stops():
        raise Stopped
      yield batch
