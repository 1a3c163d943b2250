"""Evaluators compute scores of images against a fixed set of real images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from jax.sharding import Mesh

from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.examples import original_source
from mdt_jax.data.sources import Source
from mdt_jax.errors import SettingError, check_choice, renamed_in_errors
from mdt_jax.evaluation import references, scores
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_streams import (
  GeneratedImages,
  ImageStream,
  LabelledImages,
  SourceImages,
)
from mdt_jax.evaluation.registry import METRICS, check_metrics, default_labels
from mdt_jax.evaluation.summary import Summary
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.models.conditions import LabelCondition
from mdt_jax.pretrained.torch_inception import load_inception
from mdt_jax.sampling.conditions import choose_conditions
from mdt_jax.sampling.generator import Generator, make_generator
from mdt_jax.setting_groups import LABELS_OF_SCORES
from mdt_jax.settings import Settings
from mdt_jax.types import Params

MAX_REAL_IMAGES = 10_000  # images of the run's data, if there is no reference file
_EVAL = "config.eval."  # prefix of the settings of scores in training

# What scores of conditions need, for errors.
NEEDS_CONDITIONS = (
  "needs a run of config.model.condition vector or tokens, whose data holds images of "
  "pixels, and no reference"
)


class Stopped(Exception):
  """The run was asked to stop before the scores were complete."""


class Evaluator:
  """Scores streams of images against a fixed set of real images.

  Attributes:
    metrics: names of the scores.
    real: summary of the real images.

  Args:
    metrics: keys of `registry.METRICS`.
    extract: computes the features of all these scores; see `scores.make_extractor`.
    real: summary of the real images.
    reference: file of the real images, for errors; None if the real images come from
      the run's data.
    prefix: prefix of the names of settings in errors, such as "config.eval.".
  """

  def __init__(
    self,
    metrics: Sequence[str],
    extract: FeatureExtractor,
    real: Summary,
    *,
    reference: str | None = None,
    prefix: str = "",
  ):
    self.metrics, self.real = list(metrics), real
    self._extract, self._reference, self._prefix = extract, reference, prefix

  @classmethod
  def create(
    cls,
    metrics: Sequence[str],
    *,
    reference: str | None = None,
    open_data: Callable[[], Source] | None = None,
    inception: str | os.PathLike[str] | None = None,
    weights: Params = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
    prefix: str = "",
    progress: bool = False,
    held: DataLabels | None = None,
  ) -> Evaluator:
    """Builds an evaluator: loads Inception and summarizes the real images.

    Args:
      metrics: keys of `registry.METRICS`.
      reference: file of real images or of their statistics, see
        `references.read_reference`; None for images of the run's data.
      open_data: opens the run's data; called only if a score needs real images and
        `reference` is None, or if a score asks the data itself.
      inception: file of Inception's weights; required if a score needs Inception.
      weights: the content of this file; None to read it.
      batch_size: number of images in a batch, over all devices.
      mesh: devices to use; None for all devices.
      prefix: prefix of the names of settings in errors, such as "config.eval.".
      progress: whether to show progress bars.
      held: labels of the run's data, see `references.read_reference`.

    Raises:
      SettingError: a score does not exist, a file cannot be read, or there are no or
        too few real images.
    """
    check_metrics(f"{prefix}metrics", metrics, inception is not None)
    if inception is not None and weights is None:
      weights = load_inception(inception, f"{prefix}inception")
    extract = scores.make_extractor(metrics, weights, batch_size, mesh)
    names, setting = scores.of_real_images(metrics), f"{prefix}reference"
    real = Summary({}, {})
    if names and reference is not None:
      bar = "reference" if progress else None
      real = references.read_reference(
        reference, names, extract, setting=setting, progress=bar, held=held
      )
    elif names:
      if open_data is None:
        raise SettingError(setting, None, "must be given")
      images = SourceImages(open_data(), MAX_REAL_IMAGES, setting)
      bar = "data" if progress else None
      real = scores.summarize(images, extract, names, progress=bar)
    if of_data := [name for name in metrics if METRICS[name].check_data]:
      if open_data is None:
        accepted = "needs a run, whose data it asks: give a checkpoint"
        raise SettingError(f"{prefix}metrics", of_data[0], accepted)
      source = original_source(open_data())
      with renamed_in_errors({"metrics": f"{prefix}metrics"}):
        scores.check_data(of_data, source)
      real = dataclasses.replace(real, source=source)
    return cls(metrics, extract, real, reference=reference, prefix=prefix)

  def check(self, images: GeneratedImages) -> None:
    """Raises SettingError if a score cannot be computed for images to be drawn.

    The check takes no time, while drawing the images may take hours.
    """
    if self.real.source is not None:
      names = {name: f"{self._prefix}{name}" for name in ("metrics", "num_images")}
      with renamed_in_errors(names):
        scores.check_data(self.metrics, self.real.source, images.labels)
    for name in self.metrics:
      is_missing = not images.arrays or self.real.conditions is None
      if METRICS[name].needs_conditions and is_missing:
        raise SettingError(f"{self._prefix}metrics", name, NEEDS_CONDITIONS)
    scores.check_comparable(
      self.metrics,
      self.real,
      len(images),
      images.labels,
      self._extract.sizes(images.image_shape),
      path=self._reference,
      prefix=self._prefix,
    )

  def __call__(
    self, images: ImageStream, progress: str | None = None
  ) -> dict[str, float]:
    """Computes the scores of images. All processes of a run must call this together.

    Args:
      images: images to score; read once, in batches.
      progress: title of a progress bar; None for no bar.

    Returns:
      Score by name, in the order of `metrics`.

    Raises:
      SettingError: the images cannot be read, or are too few for a score.
    """
    generated = scores.summarize(images, self._extract, self.metrics, progress=progress)
    return scores.score(self.metrics, self.real, generated)


class TrainingEvaluator:
  """Draws and scores images during training; see `config.eval`.

  Args:
    evaluator: computes the scores.
    draw: averaged parameters -> images to score.
    ema_decay: decay of the average that draws the images.
  """

  def __init__(
    self,
    evaluator: Evaluator,
    draw: Callable[[Params], GeneratedImages],
    ema_decay: float,
  ):
    self._evaluator, self._draw, self._decay = evaluator, draw, str(ema_decay)

  def __call__(
    self,
    done: int,
    ema: Mapping[str, Params],
    stops: Callable[[], bool] = lambda: False,
  ) -> dict[str, float]:
    """Draws, scores and logs. All processes of a run must call this together.

    Args:
      done: number of training steps done.
      ema: averaged parameters by decay, `TrainState.ema`.
      stops: returns whether the run is asked to stop; called after each batch. The
        answer must be the same on all processes.

    Returns:
      Score by TensorBoard tag, such as "eval/fid".

    Raises:
      Stopped: `stops` returned True.
    """
    found = self._evaluator(_UntilStopped(self._draw(ema[self._decay]), stops))
    shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
    logger.info("step %d  %s", done, shown)
    return {f"eval/{name}": value for name, value in found.items()}


def check_eval(settings: Settings) -> None:
  """Raises SettingError if training cannot compute the scores of `config.eval`."""
  chosen = settings.eval
  if chosen.every:
    has_inception = chosen.inception is not None
    check_metrics(f"{_EVAL}metrics", chosen.metric_names, has_inception)


def chosen_labels(
  experiment: Experiment, metrics: Sequence[str], labels: str | None = None
) -> str:
  """Returns how the labels of drawn images are chosen: "balanced" or "random".

  Args:
    experiment: objects of the run.
    metrics: keys of `registry.METRICS`.
    labels: the choice; None for `config.eval.labels`, or else `default_labels`.

  Raises:
    SettingError: `labels` has another value, or the network has no class labels.
  """
  if labels is not None:
    check_choice("labels", labels, LABELS_OF_SCORES)
    condition = experiment.model.conditioning
    if not (isinstance(condition, LabelCondition) or condition.arrays()):
      raise SettingError("labels", labels, "needs a network with class labels")
  return labels or experiment.settings.eval.labels or default_labels(metrics)


def draw_images(
  experiment: Experiment,
  generator: Generator,
  params: Params,
  metrics: Sequence[str],
  num_images: int,
  seed: int,
  labels: str | None = None,
) -> GeneratedImages:
  """Returns the images that a run draws for its scores.

  Args:
    experiment: objects of the run.
    generator: see `GeneratedImages`.
    params: averaged parameters, on the devices that draw.
    metrics: keys of `registry.METRICS`.
    num_images: number of images.
    seed: seed of labels and noise, in [0, 2**32).
    labels: "balanced" or "random", see `labels.draw_labels`; None for the default, see
      `chosen_labels`.

  Raises:
    SettingError: `labels` has another value, or the network has no class labels.
  """
  how = chosen_labels(experiment, metrics, labels)
  conditions = choose_conditions(
    experiment.model.conditioning,
    num_images,
    experiment.data_labels,
    how,
    seed,
    lambda: experiment.source,
  )
  return GeneratedImages(
    experiment.model,
    generator,
    params,
    conditions,
    experiment.autoencoder,
    seed,
    holds_pixels=experiment.holds_pixels,
  )


def load_training_inception(settings: Settings) -> Params:
  """Reads the Inception of `config.eval`; None if training needs none.

  Raises:
    SettingError: the file cannot be read.
  """
  chosen = settings.eval
  if not chosen.every or chosen.inception is None:
    return None
  return load_inception(chosen.inception, f"{_EVAL}inception")


def make_training_evaluator(
  experiment: Experiment, inception: Params = None
) -> TrainingEvaluator:
  """Builds the evaluator of `config.eval`, which runs on the mesh of the run.

  The real images come from `config.eval.reference`, or from the run's data if that is
  None. All processes of a run must call this together.

  Args:
    experiment: objects of the run.
    inception: see `load_training_inception`; None to read it here.

  Raises:
    SettingError: a file cannot be read, there are no real images, or a score cannot be
      computed for the images to be drawn.
  """
  settings = experiment.settings
  chosen = settings.eval
  generator = make_generator(experiment.model, experiment.sampler)

  def draw(params: Params) -> GeneratedImages:
    return draw_images(
      experiment,
      generator,
      params,
      chosen.metric_names,
      chosen.num_images,
      settings.seed,
    )

  drawn = draw(None)  # fails early, before the real images are read
  evaluator = Evaluator.create(
    chosen.metric_names,
    reference=chosen.reference,
    open_data=lambda: experiment.source,
    inception=chosen.inception,
    weights=inception,
    batch_size=chosen.batch_size,
    mesh=experiment.mesh,
    prefix=_EVAL,
    held=experiment.data_labels,
  )
  evaluator.check(drawn)
  return TrainingEvaluator(evaluator, draw, settings.sampled_decay)


class _UntilStopped:
  """Generated images; raises `Stopped` between batches."""

  def __init__(self, images: GeneratedImages, stops: Callable[[], bool]):
    self._images, self._stops = images, stops
    self.arrays = images.arrays

  def __len__(self) -> int:
    return len(self._images)

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    """Yields batches; raises `Stopped` once the run is asked to stop."""
    for batch in self._images.batches(batch_size):
      if self._stops():
        raise Stopped
      yield batch
