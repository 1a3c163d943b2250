"""Scores images against real images, or draws images from a checkpoint and scores them.

python -m mdt_jax.evaluate --reference=VIRTUAL_imagenet256_labeled.npz \\
  --samples=samples.npz --inception=inception.safetensors
python -m mdt_jax.evaluate --checkpoint=RUN --reference=REAL --inception=WEIGHTS
python -m mdt_jax.evaluate --checkpoint=RUN --metrics=frechet,accuracy,diversity
python -m mdt_jax.evaluate --checkpoint=RUN --metrics=bpd

fid, sfid, is, precision and recall are the scores of ADM's evaluator. frechet, accuracy
and diversity need no network and suit small images. bpd is the variational bound on the
negative log-likelihood of the run's data, in bits per dimension. Without --samples, the
checkpoint draws the images. The command writes scores.json, and bpd.json for bpd.
docs/evaluation.md describes the files. .npz files and outputs may lie in a bucket
(gs://…).
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

import ast
import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from absl import flags

from mdt_jax import cli
from mdt_jax.atomic import write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.loading import workdir_of
from mdt_jax.errors import SettingError, check_choice, check_range, renamed_in_errors
from mdt_jax.evaluation import bits_per_dimension, job, relation_scores
from mdt_jax.evaluation.image_files import has_labels
from mdt_jax.logs import logger
from mdt_jax.paths import any_path, output_file, output_folder
from mdt_jax.pretrained.hub import is_hub_url
from mdt_jax.setting_groups import LABELS_OF_SCORES, SamplingSettings
from mdt_jax.training.distributed import process_index

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Folder of a run of mdt_jax.main or of mdt_jax.convert, local or in a bucket "
  "(gs://...); or hf://ORG/NAME, a repository of mdt_jax.convert --push. Default: "
  "none; then --samples must be given.",
)
SAMPLES = flags.DEFINE_string(
  "samples",
  None,
  "Images to score: .npz with images (arr_0) and labels (arr_1), or a folder or .tar "
  "file of images. Default: draw images from the checkpoint.",
)
REFERENCE = flags.DEFINE_string(
  "reference",
  None,
  "Real images: .npz of images (arr_0) or of their statistics, or a folder or .tar "
  "file of images. Default: the data of the run.",
)
INCEPTION = flags.DEFINE_string(
  "inception",
  None,
  "Weights of FID's Inception network: .safetensors of mdt_jax.convert, .pth or .pb. "
  "Default: none.",
)
METRICS = flags.DEFINE_list(
  "metrics",
  None,
  "Scores: fid, sfid, is, precision, recall (these five need --inception), frechet, "
  "accuracy, diversity, bpd (needs --checkpoint); retrieval, for runs of "
  "config.model.condition vector or tokens; for runs on the source relations: "
  f"{', '.join(relation_scores.NAMES)}. Default: the first five with "
  "--inception; else frechet, accuracy and diversity with --samples or --reference; "
  "else bpd.",
)
SAVE_STATISTICS = flags.DEFINE_string(
  "save_statistics",
  None,
  "Write the statistics of the reference to this .npz, for a later --reference. "
  "Default: none.",
)
STEP = flags.DEFINE_integer(
  "step", None, "Training step of the checkpoint. Default: the latest checkpoint."
)
EMA_DECAY = flags.DEFINE_float(
  "ema_decay",
  None,
  "Decay of the averaged parameters to use, one of config.ema_decays. Default: "
  "config.sampling.ema_decay of the run, else the first.",
)
SAMPLING = flags.DEFINE_string(
  "sampling",
  "",
  "Settings of config.sampling for the drawn images, such as "
  "num_steps=50,cfg_interval=0.2,0.8. Default: those of the run.",
)
DATA_SOURCE = flags.DEFINE_string(
  "data_source", None, "Replaces config.data.source of the run. Default: the run's."
)
DATA_PATH = flags.DEFINE_string(
  "data_path", None, "Replaces config.data.path of the run. Default: the run's."
)
VAE = flags.DEFINE_string(
  "vae", None, "Autoencoder: a folder or a Hugging Face id. Default: the run's."
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  f"Number of images to draw, or, for bpd, number of images of the data. Default: "
  f"{job.NUM_IMAGES:,} drawn images, {bits_per_dimension.NUM_IMAGES:,} images for bpd.",
)
LABELS = flags.DEFINE_string(
  "labels",
  None,
  "Labels of the drawn images: random (random classes, as in the released scripts) or "
  "balanced (all classes in turn). Default: config.eval.labels of the run, else random "
  "with a score that needs --inception and balanced without.",
)
NUM_STEPS = flags.DEFINE_integer(
  "num_steps",
  None,
  "For bpd: steps of the process, from 1 to config.diffusion.num_timesteps. Default: "
  "all. Sampling steps are --sampling=num_steps=N.",
)
cli.define_alias("steps", "num_steps")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images computed at once.")
SEED = flags.DEFINE_integer(
  "seed", 0, "Seed, from 0 to 2**32 - 1; the noise of image i derives from (seed, i)."
)
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder for scores.json and bpd.json. Default: CHECKPOINT/evaluation, or the folder "
  "that holds --samples. Must be given with --checkpoint=hf://...",
)
cli.suggest(
  {
    field.name: f"--sampling={field.name}"
    for field in dataclasses.fields(SamplingSettings)
    if field.name != "ema_decay"  # a flag of its own
  }
)


def main(argv: list[str]) -> None:
  del argv
  if CHECKPOINT.value and not is_hub_url(CHECKPOINT.value):
    cli.check_run_folder("checkpoint", CHECKPOINT.value, "step", accepts_parent=True)
  metrics = job.choose_metrics(
    METRICS.value,
    has_checkpoint=bool(CHECKPOINT.value),
    has_images=bool(SAMPLES.value or REFERENCE.value),
    has_inception=bool(INCEPTION.value),
    has_labels=METRICS.value is not None or _have_labels(),
  )
  _check_flags(metrics)
  outputs = _outputs(metrics)
  if SAVE_STATISTICS.value is not None:
    output_file("save_statistics", SAVE_STATISTICS.value)
  with renamed_in_errors(_names_of_flags()):
    checkpoint = None
    if CHECKPOINT.value:
      checkpoint = job.load_run(
        CHECKPOINT.value,
        STEP.value,
        EMA_DECAY.value,
        vae=VAE.value,
        data_source=DATA_SOURCE.value,
        data_path=DATA_PATH.value,
        sampling=_sampling(),
      )
    if checkpoint is not None and job.BPD in metrics:
      found = bits_per_dimension.measure(
        checkpoint,
        NUM_IMAGES.value or bits_per_dimension.NUM_IMAGES,
        num_steps=NUM_STEPS.value,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
      )
      logger.info(
        "%(total_bpd).4f bits a dimension (prior %(prior_bpd).4f) of %(images)d "
        "images at step %(step)d",
        found,
      )
      _write(outputs[job.BPD], found)
    of_images = [name for name in metrics if name != job.BPD]
    if of_images:
      found = job.score_images(
        of_images,
        checkpoint,
        samples=SAMPLES.value,
        reference=REFERENCE.value,
        inception=INCEPTION.value,
        statistics=SAVE_STATISTICS.value,
        num_images=NUM_IMAGES.value or job.NUM_IMAGES,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
        labels=LABELS.value,
      )
      for name, value in found["scores"].items():
        logger.info("%-10s %10.4f", name, value)
      _write(outputs["scores"], {**found, "checkpoint": CHECKPOINT.value})


def _have_labels() -> bool:
  """Whether the given images have labels; drawn images and the data of a run do."""
  given = {"samples": SAMPLES.value, "reference": REFERENCE.value}
  return all(has_labels(path, name) for name, path in given.items() if path)


def _check_flags(metrics: list[str]) -> None:
  check_range("num_images", NUM_IMAGES.value, 1, cli.MAX_IMAGES)
  check_range("batch_size", BATCH_SIZE.value, 1, cli.MAX_BATCH_SIZE)
  check_range("seed", SEED.value, 0, 2**32 - 1)
  if LABELS.value is not None:
    check_choice("labels", LABELS.value, LABELS_OF_SCORES)
    if SAMPLES.value or metrics == [job.BPD]:
      raise SettingError(
        "labels", LABELS.value, "is for images that a checkpoint draws"
      )
  if SAVE_STATISTICS.value and Path(SAVE_STATISTICS.value).suffix != ".npz":
    raise SettingError("save_statistics", SAVE_STATISTICS.value, "must end in .npz")
  if not (CHECKPOINT.value or SAMPLES.value):
    raise SettingError("samples", None, "must be given, or --checkpoint")
  if NUM_STEPS.value is not None and job.BPD not in metrics:
    raise SettingError(
      _names_of_flags()["num_steps"],
      NUM_STEPS.value,
      f"goes with --metrics=bpd; give --sampling=num_steps={NUM_STEPS.value}",
    )


def _names_of_flags() -> dict[str, str]:
  """Name of a setting or an argument -> its flag, as the user typed it."""
  is_alias = flags.FLAGS["steps"].present
  return {
    "path": "checkpoint",
    "name": "checkpoint",
    "config.data.source": "data_source",
    "config.data.path": "data_path",
    "config.data.vae": "vae",
    "num_steps": "steps" if is_alias else "num_steps",
  }


def _sampling() -> dict[str, Any]:
  """The settings of --sampling=name=value,name=value."""
  known = [field.name for field in dataclasses.fields(SamplingSettings)]
  found = {}
  # A comma may be part of a value, such as an interval.
  for setting in re.split(r",(?=\w+=)", SAMPLING.value) if SAMPLING.value else []:
    name, _, text = setting.partition("=")
    check_choice("sampling", name, sorted(known))
    found[name] = _parse(text)
  return found


def _parse(text: str) -> Any:
  """Parses a value in JSON (true) or in Python (0.2,0.8); other texts stay texts."""
  for parse in (json.loads, ast.literal_eval):
    with contextlib.suppress(ValueError, SyntaxError):
      return parse(text)
  return text


def _outputs(metrics: list[str]) -> dict[str, AnyPath]:
  """The files to write: "bpd" and "scores", as far as they are asked for.

  Raises:
    SettingError: a file cannot be written.
  """
  if OUTPUT.value is not None:
    folder = output_folder("output", OUTPUT.value)
  elif CHECKPOINT.value and is_hub_url(CHECKPOINT.value):
    raise SettingError("output", None, "must be given with --checkpoint=hf://...")
  elif CHECKPOINT.value:
    folder = workdir_of(CHECKPOINT.value) / "evaluation"
  else:
    folder = any_path("samples", SAMPLES.value or "").parent
  names = [job.BPD] if job.BPD in metrics else []
  if metrics != [job.BPD]:
    names.append("scores")
  return {name: output_file("output", folder / f"{name}.json") for name in names}


def _write(path: AnyPath, found: dict[str, Any]) -> None:
  """Writes scores; all processes hold the same ones, and process 0 writes them."""
  if process_index() > 0:
    return
  write_json(path, found)
  logger.info("%s", path)


if __name__ == "__main__":
  cli.run(main)
