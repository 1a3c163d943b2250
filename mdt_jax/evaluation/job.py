"""The jobs of mdt_jax.evaluate: choose scores, load a run, score its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mdt_jax import sharding
from mdt_jax.checkpoints.loading import Checkpoint, load_ema
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.image_streams import GeneratedImages, NpzImages
from mdt_jax.evaluation.references import save_statistics
from mdt_jax.evaluation.registry import (
  METRICS,
  check_metrics,
  inception_metrics,
  other_metrics,
)
from mdt_jax.logs import logger
from mdt_jax.sampling.generator import make_generator

BPD = "bpd"  # a score of a network and not of images; see `bits_per_dimension`
NUM_IMAGES = 50_000  # drawn images


def choose_metrics(
  asked: Sequence[str] | None,
  *,
  has_checkpoint: bool,
  has_images: bool,
  has_inception: bool,
) -> list[str]:
  """The scores asked for, or else those that suit the given files.

  Args:
    asked: keys of `METRICS`, or BPD; None to choose by the files.
    has_checkpoint: whether a checkpoint is given.
    has_images: whether samples or a reference are given.
    has_inception: whether Inception's weights are given.

  Raises:
    SettingError: a score does not exist, or needs a file that is not given.
  """
  if asked is not None:
    names = list(dict.fromkeys(asked))
    if BPD in names and not has_checkpoint:
      raise SettingError("metrics", BPD, "needs a checkpoint: --checkpoint")
  elif has_inception:
    names = inception_metrics()
  elif has_images:
    names = other_metrics()
  else:
    names = [BPD]
  for name in names:
    check_choice("metrics", name, [*METRICS, BPD])
  if names != [BPD]:
    check_metrics("metrics", [name for name in names if name != BPD], has_inception)
  return names


def load_run(
  path: str | Path,
  step: int | None = None,
  ema_decay: float | None = None,
  *,
  vae: str | None = None,
  data_source: str | None = None,
  data_path: str | None = None,
  sampling: Mapping[str, Any] | None = None,
) -> Checkpoint:
  """A checkpoint with some settings replaced; None keeps a setting of the run.

  Args:
    path: workdir of the run.
    step: of the checkpoint; None for the latest.
    ema_decay: decay of the averaged parameters.
    vae: autoencoder, a folder or hub id.
    data_source: kind of data.
    data_path: folder of the data. Of other data than the run's, nothing is held out.
    sampling: settings of `config.sampling`.

  Raises:
    SettingError: the checkpoint cannot be loaded, or a setting cannot be used.
  """
  checkpoint = load_ema(path, step, ema_decay)
  experiment = checkpoint.experiment.with_vae(vae)
  data = experiment.settings.data
  if data_source or data_path:
    if data.validation:
      logger.info("all of the given data is used: none of it counts as held out")
    experiment = experiment.with_data(
      source=data_source or data.source,
      path=data_path or data.path,
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
) -> dict[str, Any]:
  """Scores images of a file, or images that a checkpoint draws, with progress bars.

  Args:
    metrics: keys of `METRICS`.
    checkpoint: draws images if there are no samples; its data replaces a missing
      reference.
    samples: .npz file of images; see `NpzImages`.
    reference: file of real images; see `references.read_reference`.
    inception: file of Inception's weights.
    statistics: .npz file to write what the scores need of the real images to.
    num_images: images to draw.
    batch_size: images at a time, over all devices.
    seed: image i is drawn from (seed, i).

  Returns:
    "scores" by name, number of "images", and the arguments that they depend on.

  Raises:
    SettingError: a file cannot be read or written, or images lack a score.
  """
  experiment = None if checkpoint is None else checkpoint.experiment
  mesh = sharding.make_mesh() if experiment is None else experiment.mesh
  # Opened before the reference is computed, so that an error comes early.
  if samples is not None:
    images = NpzImages(samples, "samples")
  elif checkpoint is not None:
    images = _drawn(checkpoint, num_images, seed)
  else:
    raise SettingError("samples", None, "must be given, or a checkpoint")
  evaluate = Evaluator.create(
    metrics,
    reference=reference,
    open_data=None if experiment is None else lambda: experiment.source,
    inception=inception,
    batch_size=batch_size,
    mesh=mesh,
    progress=True,
  )
  if statistics is not None:
    save_statistics(statistics, evaluate.real)
    logger.info("statistics of the reference: %s", statistics)
  sampling = None
  if isinstance(images, GeneratedImages):  # drawing may take hours
    evaluate.check(images)
    assert experiment is not None
    sampling = dataclasses.asdict(experiment.settings.sampling)
  with sharding.use_mesh(mesh):
    found = evaluate(images, progress="samples")
  return {
    "scores": found,
    "images": len(images),
    "samples": samples,
    "step": None if checkpoint is None else checkpoint.step,
    "sampling": sampling,
    "reference": reference,
    "inception": inception,
  }


def _drawn(checkpoint: Checkpoint, num_images: int, seed: int) -> GeneratedImages:
  """Images that all devices draw together."""
  experiment = checkpoint.experiment
  return GeneratedImages(
    experiment.model,
    make_generator(experiment.model, experiment.sampler),
    jax.device_put(checkpoint.params, sharding.replicated(experiment.mesh)),
    num_images,
    experiment.autoencoder,
    seed,
    holds_pixels=experiment.holds_pixels,
  )
