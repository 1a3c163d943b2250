"""Draws images from a checkpoint: python -m mdt_jax.sample --checkpoint=WORKDIR

Writes samples.png, a grid with labels, and samples.npz (arr_0 uint8 NHWC, arr_1
labels). Settings not given are those of the run. A model of latents without a VAE
writes latents.npz (arr_0 float32) and a preview.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from absl import flags

from mdt_jax import cli
from mdt_jax.errors import SettingError
from mdt_jax.generation import generate, images
from mdt_jax.pipeline import Pipeline
from mdt_jax.training.checkpoints import workdir_of

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the latest.")
EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Which average of the parameters.")
LABELS = flags.DEFINE_list(
  "labels", None, "Classes, taken in turn; all, or the first 100, by default."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Images; one for each label.")
SAMPLER = flags.DEFINE_string("sampler", None, "ddpm or ddim.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps.")
ETA = flags.DEFINE_float("eta", None, "Noise of ddim, 0 to 1.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale; 1 for none.")
CFG_POWER = flags.DEFINE_float("cfg_power", None, "Power of its cosine; 0: constant.")
VAE = flags.DEFINE_string(
  "vae", None, "Folder or hub id that decodes latents; the run's; none: undecoded."
)
SEED = flags.DEFINE_integer("seed", 0, "Image i derives from (seed, i).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images sampled at a time.")
OUTPUT = flags.DEFINE_string("output", None, "Folder; WORKDIR/samples by default.")

logger = logging.getLogger("mdt_jax")
MAX_IN_GRID = 100


def main(argv: list[str]) -> None:
  del argv
  _at_least_one("--num_images", NUM_IMAGES.value)
  _at_least_one("--batch_size", BATCH_SIZE.value)
  if not 0 <= SEED.value < 2**32:
    raise SettingError("--seed", SEED.value, "must lie in [0, 2**32)")
  pipeline = Pipeline.from_checkpoint(
    CHECKPOINT.value, STEP.value, EMA_DECAY.value, vae=VAE.value
  )
  labels = _choose_labels(pipeline.config.model.num_classes)
  output = Path(OUTPUT.value or workdir_of(CHECKPOINT.value) / "samples")
  sampling = {
    "method": SAMPLER.value,
    "num_steps": STEPS.value,
    "eta": ETA.value,
    "cfg_scale": CFG_SCALE.value,
    "cfg_power": CFG_POWER.value,
  }
  arrays = pipeline(
    labels,
    seed=SEED.value,
    batch_size=BATCH_SIZE.value,
    progress=True,
    **{name: value for name, value in sampling.items() if value is not None},
  )
  output.mkdir(parents=True, exist_ok=True)
  if pipeline.draws_pixels:
    pictures = images.to_uint8(arrays)
    data = output / "samples.npz"
    images.save_npz(data, pictures, labels)
  else:
    pictures = images.latent_preview(arrays)
    data = output / "latents.npz"
    images.save_npz(data, arrays, labels)
  captions = [str(label) for label in labels[:MAX_IN_GRID]]
  images.make_grid(pictures[:MAX_IN_GRID], captions).save(output / "samples.png")
  logger.info(
    "%d images of step %d: %s, %s",
    len(arrays),
    pipeline.step,
    output / "samples.png",
    data,
  )


def _choose_labels(num_classes: int) -> np.ndarray:
  """The labels asked for, in turn, until there are enough."""
  try:
    labels = [int(label) for label in LABELS.value or range(num_classes)]
  except ValueError:
    raise SettingError(
      "--labels", ",".join(LABELS.value), f"must be numbers from 0 to {num_classes - 1}"
    ) from None
  generate.check_labels("--labels", labels, num_classes)
  default = len(labels) if LABELS.value else min(num_classes, MAX_IN_GRID)
  return np.resize(labels, NUM_IMAGES.value or default)


def _at_least_one(setting: str, value: int | None) -> None:
  if value is not None and value < 1:
    raise SettingError(setting, value, "must be at least 1")


if __name__ == "__main__":
  cli.run(main)
