"""Scores samples against real images, or a checkpoint.

python -m mdt_jax.evaluate --reference=VIRTUAL_imagenet256_labeled.npz \\
  --samples=samples.npz --inception=inception.safetensors
python -m mdt_jax.evaluate --checkpoint=WORKDIR --reference=… --inception=…
python -m mdt_jax.evaluate --checkpoint=WORKDIR --metrics=frechet,accuracy,diversity
python -m mdt_jax.evaluate --checkpoint=WORKDIR --metrics=bpd

fid, sfid, is, precision and recall are those of ADM's evaluator; frechet, accuracy and
diversity need no network and suit small images; bpd is the variational bound in bits a
dimension, of data. Without --samples the checkpoint draws them. What is found goes to
scores.json (bpd: bpd.json). Formats: docs/evaluation.md.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import cli, factories, sharding
from mdt_jax.atomic import write_json
from mdt_jax.checkpoints.manager import load_ema, workdir_of
from mdt_jax.errors import SettingError, check_choice, renamed_in_errors
from mdt_jax.evaluation import bits_per_dimension, metrics, scores
from mdt_jax.evaluation.evaluator import MAX_REAL_IMAGES
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_streams import (
  GeneratedImages,
  ImageStream,
  NpzImages,
  SourceImages,
)
from mdt_jax.sampling import batches
from mdt_jax.sampling.overrides import with_sampling, with_vae

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.")
SAMPLES = flags.DEFINE_string(
  "samples", None, ".npz of images (arr_0, labels arr_1) instead of drawing them."
)
REFERENCE = flags.DEFINE_string(
  "reference", None, ".npz of real images or of their statistics; the run's data."
)
INCEPTION = flags.DEFINE_string(
  "inception", None, "Weights: .safetensors of mdt_jax.convert, .pth or .pb."
)
METRICS = flags.DEFINE_list(
  "metrics",
  None,
  "Scores: fid, sfid, is, precision, recall (all five with --inception), frechet, "
  "accuracy, diversity, bpd (of a checkpoint alone).",
)
SAVE_STATISTICS = flags.DEFINE_string(
  "save_statistics", None, "Write what is needed of the reference to this .npz."
)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the latest.")
EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Which average of the parameters.")
SAMPLING = flags.DEFINE_string(
  "sampling", "", "Of drawn samples: num_steps=50,cfg_interval=0.2,0.8; else the run's."
)
DATA_SOURCE = flags.DEFINE_string("data_source", None, "Instead of the run's.")
DATA_PATH = flags.DEFINE_string("data_path", None, "Instead of the run's.")
VAE = flags.DEFINE_string("vae", None, "That decodes latents, instead of the run's.")
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", None, "Drawn, 50,000; for bpd images spread over the data, 1,000."
)
STEPS = flags.DEFINE_integer("steps", None, "Of bpd: respaced steps; all by default.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images at a time.")
SEED = flags.DEFINE_integer("seed", 0, "Image i derives its noise from (seed, i).")
OUTPUT = flags.DEFINE_string(
  "output", None, "Folder; WORKDIR/evaluation, or that of --samples, by default."
)

BPD = "bpd"
AS_FLAGS = {
  "config.data.source": "--data_source",
  "config.data.path": "--data_path",
  "config.data.vae": "--vae",
}
DRAWN_IMAGES, BPD_IMAGES = 50_000, 1000

logger = logging.getLogger("mdt_jax")


def main(argv: list[str]) -> None:
  del argv
  names = _chosen_metrics()
  _check_numbers()
  if not (CHECKPOINT.value or SAMPLES.value):
    raise SettingError("--samples", None, "must be given, or --checkpoint")
  with renamed_in_errors(AS_FLAGS):
    run = _load_run() if CHECKPOINT.value else None
    if BPD in names:
      _measure_bpd(run)
      names.remove(BPD)
    if names:
      _measure_scores(names, run)


@dataclasses.dataclass(frozen=True)
class Run:
  """A checkpoint and what belongs to it."""

  config: ConfigDict
  params: Any
  step: int
  autoencoder: Autoencoder | None


def _load_run() -> Run:
  config, params, step = load_ema(CHECKPOINT.value, STEP.value, EMA_DECAY.value)
  config.sampling.ema_decay = factories.sampled_decay(config, EMA_DECAY.value)
  config = with_vae(config, VAE.value)
  if DATA_SOURCE.value or DATA_PATH.value:
    config.data.source = DATA_SOURCE.value or config.data.source
    config.data.path = DATA_PATH.value or config.data.path
    if config.data.validation:
      logger.info("all of the data given is used: none of it counts as held out")
    config.data.validation = 0.0  # nothing of other data was trained on
  config = with_sampling(config, _sampling(config))
  return Run(config, params, step, factories.make_autoencoder(config))


def _chosen_metrics() -> list[str]:
  """Those asked for; else those that what is given suffices for."""
  if METRICS.value is not None:
    names = list(dict.fromkeys(METRICS.value))
    if BPD in names and not CHECKPOINT.value:
      raise SettingError("--metrics", BPD, "needs --checkpoint")
  elif INCEPTION.value:
    names = list(metrics.INCEPTION_METRICS)
  elif SAMPLES.value or REFERENCE.value:
    names = list(metrics.PIXEL_METRICS)
  else:
    names = [BPD]
  for name in names:
    check_choice("--metrics", name, [*metrics.METRICS, BPD])
  if names != [BPD]:
    of_images = [name for name in names if name != BPD]
    metrics.check_metrics("--metrics", of_images, INCEPTION.value is not None)
  return names


def _check_numbers() -> None:
  for name in ("num_images", "batch_size"):
    value = flags.FLAGS[name].value
    if value is not None and value < 1:
      raise SettingError(f"--{name}", value, "must be at least 1")
  if not 0 <= SEED.value < 2**32:
    raise SettingError("--seed", SEED.value, "must lie in [0, 2**32)")
  if SAVE_STATISTICS.value and Path(SAVE_STATISTICS.value).suffix != ".npz":
    raise SettingError("--save_statistics", SAVE_STATISTICS.value, "must end in .npz")


def _measure_scores(names: list[str], run: Run | None) -> None:
  inception = None
  if INCEPTION.value:
    from mdt_jax.pretrained.torch_inception import load_inception

    inception = load_inception(INCEPTION.value)
  mesh = sharding.make_mesh()
  extract = scores.make_extractor(names, inception, BATCH_SIZE.value, mesh)
  # Opened before the reference is computed, so that what is wrong is told at once.
  samples = _open_samples(run, mesh)
  real = _read_real(scores.of_real_images(names), run, extract)
  if SAVE_STATISTICS.value:
    scores.save_statistics(SAVE_STATISTICS.value, real)
    logger.info("statistics of the reference: %s", SAVE_STATISTICS.value)
  if isinstance(samples, GeneratedImages):  # drawing them may take hours
    sizes = extract.sizes(samples.image_shape)
    scores.check_comparable(names, real, samples.labels, sizes, path=REFERENCE.value)
  with sharding.use_mesh(mesh):
    generated = scores.summarize(samples, extract, names, progress="samples")
  found = scores.score(names, real, generated)
  for name, value in found.items():
    logger.info("%-10s %10.4f", name, value)
  _write(
    "scores.json",
    {
      "scores": found,
      "images": len(samples),
      "samples": SAMPLES.value,
      "checkpoint": CHECKPOINT.value,
      "step": run and run.step,
      "sampling": None if SAMPLES.value else run.config.sampling.to_dict(),
      "reference": REFERENCE.value,
      "inception": INCEPTION.value,
    },
  )


def _open_samples(run: Run | None, mesh: Mesh) -> ImageStream:
  if SAMPLES.value:
    return NpzImages(SAMPLES.value)
  autoencoder, everywhere = run.autoencoder, sharding.replicated(mesh)
  if autoencoder is not None:
    params = jax.device_put(autoencoder.params, everywhere)
    autoencoder = dataclasses.replace(autoencoder, params=params)
  return GeneratedImages(
    run.config,
    batches.make_generator(run.config),
    jax.device_put(run.params, everywhere),
    NUM_IMAGES.value or DRAWN_IMAGES,
    autoencoder,
    SEED.value,
  )


def _sampling(config: ConfigDict) -> dict[str, Any]:
  """The settings of --sampling=name=value,name=value."""
  found = {}
  # A comma may be part of a value: that of an interval.
  for setting in re.split(r",(?=\w+=)", SAMPLING.value) if SAMPLING.value else []:
    name, _, text = setting.partition("=")
    check_choice("--sampling", name, sorted(config.sampling))
    found[name] = _parse(text)
  return found


def _parse(text: str) -> Any:
  """A value as JSON (true) or Python (0.2,0.8) writes it; else the text."""
  for parse in (json.loads, ast.literal_eval):
    with contextlib.suppress(ValueError, SyntaxError):
      return parse(text)
  return text


def _read_real(
  names: list[str], run: Run | None, extract: FeatureExtractor
) -> scores.Summary:
  if not names:
    return scores.Summary({}, {})
  if REFERENCE.value:
    return scores.read_reference(REFERENCE.value, names, extract, progress="reference")
  if run is None:
    raise SettingError("--reference", None, "must be given")
  source = factories.make_source(run.config, run.autoencoder)
  images = SourceImages(source, MAX_REAL_IMAGES)
  return scores.summarize(images, extract, names, progress="data")


def _measure_bpd(run: Run) -> None:
  num_timesteps = run.config.diffusion.num_timesteps
  if STEPS.value is not None and not 1 <= STEPS.value <= num_timesteps:
    accepted = f"must lie in [1, config.diffusion.num_timesteps = {num_timesteps}]"
    raise SettingError("--steps", STEPS.value, accepted)
  held_out = run.config.data.validation > 0
  source = factories.make_source(run.config, run.autoencoder, held_out=held_out)
  count = min(NUM_IMAGES.value or BPD_IMAGES, len(source))
  batches = bits_per_dimension.bounds(
    bits_per_dimension.make_bound(run.config, STEPS.value, run.autoencoder),
    run.params,
    source,
    np.linspace(0, len(source) - 1, count).astype(int),
    seed=SEED.value,
    batch_size=min(BATCH_SIZE.value, count),
  )
  found: list[dict[str, np.ndarray]] = []
  with tqdm.tqdm(total=count, unit="image") as bar:
    for terms in batches:
      found.append(terms)
      bar.update(len(terms["total_bpd"]))
  means = {
    name: np.concatenate([terms[name] for terms in found]).mean(axis=0).tolist()
    for name in found[0]
  }
  logger.info(
    "%.4f bits a dimension (prior %.4f) of %d images at step %d",
    means["total_bpd"],
    means["prior_bpd"],
    count,
    run.step,
  )
  of = {"step": run.step, "ema_decay": run.config.sampling.ema_decay}
  _write("bpd.json", {**of, "held_out": held_out, "images": count, **means})


def _write(name: str, found: dict[str, Any]) -> None:
  output = OUTPUT.value
  if output is None and CHECKPOINT.value:
    output = workdir_of(CHECKPOINT.value) / "evaluation"
  elif output is None:
    output = Path(SAMPLES.value).parent
  path = Path(output) / name
  write_json(path, found)
  logger.info("%s", path)


if __name__ == "__main__":
  cli.run(main)
