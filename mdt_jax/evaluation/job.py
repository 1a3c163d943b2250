"""The steps of mdt_jax.evaluate: choose scores, load a run, score images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mdt_jax import sharding
from mdt_jax.checkpoints import hub_folders
from mdt_jax.checkpoints.loading import Checkpoint
from mdt_jax.data.sources import SOURCES
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.evaluation.evaluator import (
  NEEDS_CONDITIONS,
  Evaluator,
  chosen_labels,
  draw_images,
)
from mdt_jax.evaluation.image_files import label_of_named_class, open_image_stream
from mdt_jax.evaluation.image_streams import GeneratedImages
from mdt_jax.evaluation.references import save_statistics
from mdt_jax.evaluation.registry import (
  METRICS,
  check_metrics,
  inception_metrics,
  other_metrics,
)
from mdt_jax.logs import logger
from mdt_jax.models.registry import Model
from mdt_jax.sampling.generator import make_generator

BPD = "bpd"  # a score of the network instead of images; see `bits_per_dimension`
NUM_IMAGES = 50_000  # default number of images to draw


def choose_metrics(
  asked: Sequence[str] | None,
  *,
  has_checkpoint: bool,
  has_images: bool,
  has_inception: bool,
  has_labels: bool = True,
) -> list[str]:
  """Checks the scores that the user asked for, or chooses scores for the given files.

  Default: the scores that need Inception, if Inception's weights are given; else the
  other scores, if samples or a reference are given; else `BPD`. Without labels, the
  scores that need labels are left out.

  Args:
    asked: keys of `METRICS`, or `BPD`; None for the default.
    has_checkpoint: whether the user gave a checkpoint.
    has_images: whether the user gave samples or a reference.
    has_inception: whether the user gave Inception's weights.
    has_labels: whether the samples and the reference have labels.

  Returns:
    Names of the scores, without duplicates.

  Raises:
    SettingError: a score does not exist, or a file that the score needs is missing.
  """
  if asked is not None:
    names = list(dict.fromkeys(asked))
    if BPD in names and not has_checkpoint:
      raise SettingError("metrics", BPD, "needs a checkpoint: --checkpoint")
  elif has_inception:
    names = inception_metrics()
  elif has_images:
    names = other_metrics()
    left_out = [name for name in names if METRICS[name].needs_labels and not has_labels]
    names = [name for name in names if name not in left_out]
    if left_out:
      logger.info("without labels of the images: no %s", " and no ".join(left_out))
  else:
    names = [BPD]
  for name in names:
    check_choice("metrics", name, [*METRICS, BPD])
  if names != [BPD]:
    check_metrics("metrics", [name for name in names if name != BPD], has_inception)
  return names


def load_run(
  path: str | os.PathLike[str],
  step: int | None = None,
  ema_decay: float | None = None,
  *,
  vae: str | None = None,
  data_source: str | None = None,
  data_path: str | None = None,
  sampling: Mapping[str, Any] | None = None,
  model: Model | None = None,
) -> Checkpoint:
  """Loads a checkpoint and replaces some settings of the run; None keeps a setting.

  Args:
    path: workdir of the run, or hf://ORG/NAME; see `hub_folders.load_run`.
    step: step of the checkpoint; None for the latest.
    ema_decay: decay of the averaged parameters.
    vae: autoencoder, a folder or Hugging Face id.
    data_source: replaces config.data.source.
    data_path: replaces config.data.path. With other data, config.data.validation is
      ignored and all of the data is used.
    sampling: replaces settings of config.sampling, by name.
    model: your own network, if the run was trained with one.

  Raises:
    SettingError: the checkpoint cannot be loaded, or a setting is invalid.
  """
  checkpoint = hub_folders.load_run(path, step, ema_decay, model)
  experiment = checkpoint.experiment.with_vae(vae)
  data = experiment.settings.data
  if data_source or data_path:
    if data.validation:
      logger.info(
        "using all of the given data: config.data.validation of the run is ignored"
      )
    source = data_source or data.source
    has_path = source not in SOURCES or SOURCES[source].path is not None
    experiment = experiment.with_data(
      source=source,
      path=data_path or (data.path if has_path else None),
      arguments=data.arguments if source == data.source else {},
      flip=data.flip and source != "relations",  # a score flips nothing
      validation=0.0,  # the run did not train on any of this data
    )
  experiment = experiment.with_sampling(sampling or {})
  return dataclasses.replace(checkpoint, experiment=experiment)


def score_images(
  metrics: Sequence[str],
  checkpoint: Checkpoint | None = None,
  *,
  samples: str | None = None,
  reference: str | None = None,
  inception: str | None = None,
  statistics: str | None = None,
  num_images: int = NUM_IMAGES,
  batch_size: int = 64,
  seed: int = 0,
  labels: str | None = None,
) -> dict[str, Any]:
  """Scores images of a file, or images that a checkpoint draws, with progress bars.

  Args:
    metrics: keys of `METRICS`.
    checkpoint: draws the images if `samples` is None; provides the real images if
      `reference` is None.
    samples: .npz file, .tar file or folder of images to score; see
      `image_files.open_image_stream`.
    reference: file of real images; see `references.read_reference`.
    inception: file of Inception's weights.
    statistics: .npz file to write the summary of the real images to, for later use as
      `reference`; None writes no file.
    num_images: number of images to draw.
    batch_size: number of images in a batch, over all devices.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
    labels: how the labels of drawn images are chosen; see `evaluator.draw_images`.

  Returns:
    "scores" by name, number of "images", and the arguments that the scores depend on.

  Raises:
    SettingError: a file cannot be read or written, or a score cannot be computed.
  """
  experiment = None if checkpoint is None else checkpoint.experiment
  mesh = sharding.make_mesh() if experiment is None else experiment.mesh
  held = None if experiment is None else experiment.data_labels
  # Fails early, before the reference is read.
  draws_pixels = experiment is not None and experiment.holds_pixels and samples is None
  for name in metrics:
    if METRICS[name].needs_conditions and (reference is not None or not draws_pixels):
      raise SettingError("metrics", name, NEEDS_CONDITIONS)
  if samples is not None:
    images = open_image_stream(
      samples, "samples", label_of_named_class(held, reference)
    )
  elif checkpoint is not None:
    assert experiment is not None
    images = draw_images(
      experiment,
      make_generator(experiment.model, experiment.sampler),
      jax.device_put(checkpoint.params, sharding.replicated(mesh)),
      metrics,
      num_images,
      seed,
      labels,
    )
  else:
    raise SettingError("samples", None, "samples or a checkpoint must be given")
  evaluate = Evaluator.create(
    metrics,
    reference=reference,
    open_data=None if experiment is None else lambda: experiment.source,
    inception=inception,
    batch_size=batch_size,
    mesh=mesh,
    progress=True,
    held=held,
  )
  if statistics is not None and jax.process_index() == 0:
    save_statistics(statistics, evaluate.real)
    logger.info("wrote the statistics of the real images to %s", statistics)
  sampling = drawn_labels = None
  if isinstance(images, GeneratedImages):  # drawing may take hours
    evaluate.check(images)
    assert experiment is not None
    sampling = dataclasses.asdict(experiment.settings.sampling)
    drawn_labels = chosen_labels(experiment, metrics, labels)
  with sharding.use_mesh(mesh):
    found = evaluate(images, progress="samples")
  return {
    "scores": found,
    "images": len(images),
    "samples": samples,
    "step": None if checkpoint is None else checkpoint.step,
    "sampling": sampling,
    "labels": drawn_labels,
    "seed": None if samples is not None else seed,
    "reference": reference,
    "inception": inception,
  }
