"""Draws images from a checkpoint: python -m mdt_jax.sample --checkpoint=WORKDIR

Over all devices of all processes, to OUTPUT/samples.npz (arr_0 uint8 NHWC, arr_1
labels) and samples.png, a grid with labels; a run that was stopped goes on. Settings
not given are those of the training run. A model of latents without an autoencoder
writes latents.npz (arr_0 float32) and a preview.

--inpaint=IMAGE --mask=MASK paints what is white in the mask; --edit=IMAGE turns an
image into one of another class.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints.manager import workdir_of
from mdt_jax.errors import SettingError
from mdt_jax.sampling.labels import BALANCED, RANDOM, draw_labels, parse_labels
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.writer import MAX_IN_GRID

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the latest.")
EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Which average of the parameters.")
LABELS = flags.DEFINE_list(
  "labels",
  BALANCED,
  f"Classes, by number or ImageNet's name, taken in turn; {BALANCED}: all in turn; "
  f"{RANDOM}.",
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", None, "Images; by default one for each label, of all at most 100."
)
SAMPLER = flags.DEFINE_string(
  "sampler", None, "ddpm, ddim, euler, heun, dpm++ or dpm++sde."
)
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps.")
SPACING = flags.DEFINE_string("spacing", None, "uniform, log_snr or karras.")
ETA = flags.DEFINE_float("eta", None, "Noise of ddim, 0 to 1.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale; 1 for none.")
CFG_POWER = flags.DEFINE_float("cfg_power", None, "Power of its cosine; 0: constant.")
CFG_CHANNELS = flags.DEFINE_integer("cfg_channels", None, "Channels guided; 0: all.")
CFG_INTERVAL = flags.DEFINE_list(
  "cfg_interval", None, "LOW,HIGH: guide where t / T lies between them."
)
INPAINT = flags.DEFINE_string("inpaint", None, "Image to be painted in.")
MASK = flags.DEFINE_string("mask", None, "Image, white where to paint.")
INTERPOLATION = flags.DEFINE_float(
  "interpolation",
  None,
  "Share of the process, from full noise, in which the side-interpolater predicts "
  "what is hidden.",
)
REPEATS = flags.DEFINE_integer(
  "repeats", None, "How often each step of inpainting is taken (RePaint); 1."
)
EDIT = flags.DEFINE_string("edit", None, "Image to be turned into other classes.")
STRENGTH = flags.DEFINE_float("strength", None, "How much it is changed, up to 1.")
VAE = flags.DEFINE_string(
  "vae", None, "Folder or hub id that decodes latents; the run's; none: undecoded."
)
SEED = flags.DEFINE_integer("seed", 0, "Image i derives from (seed, i).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images a device makes at a time.")
PNG = flags.DEFINE_bool("png", False, "Write a folder of PNGs too.")
OUTPUT = flags.DEFINE_string("output", None, "Folder; WORKDIR/samples by default.")

logger = logging.getLogger("mdt_jax")


def main(argv: list[str]) -> None:
  del argv
  if NUM_IMAGES.value is not None and NUM_IMAGES.value < 1:
    raise SettingError("num_images", NUM_IMAGES.value, "must be at least 1")
  pipeline = Pipeline.from_checkpoint(
    CHECKPOINT.value, STEP.value, EMA_DECAY.value, vae=VAE.value
  )
  sampling = {
    "method": SAMPLER.value,
    "num_steps": STEPS.value,
    "spacing": SPACING.value,
    "eta": ETA.value,
    "cfg_scale": CFG_SCALE.value,
    "cfg_power": CFG_POWER.value,
    "cfg_channels": CFG_CHANNELS.value,
    "cfg_interval": _interval(),
  }
  labels = _labels(pipeline.config.model.num_classes)
  file = pipeline.write(
    OUTPUT.value or workdir_of(CHECKPOINT.value) / "samples",
    labels,
    png=PNG.value,
    seed=SEED.value,
    batch_size=BATCH_SIZE.value,
    inpaint=_path(INPAINT.value),
    mask=_path(MASK.value),
    interpolation=INTERPOLATION.value,
    repeats=REPEATS.value,
    edit=_path(EDIT.value),
    strength=STRENGTH.value,
    **{name: value for name, value in sampling.items() if value is not None},
  )
  logger.info("%d images of step %d: %s", len(labels), pipeline.step, file)


def _labels(num_classes: int) -> np.ndarray:
  """A label for each image."""
  if LABELS.value in ([BALANCED], [RANDOM]):
    count = NUM_IMAGES.value or min(num_classes, MAX_IN_GRID)
    return draw_labels(LABELS.value[0], count, num_classes, SEED.value)
  labels = parse_labels("labels", LABELS.value, num_classes)
  return np.resize(labels, NUM_IMAGES.value or len(labels))


def _interval() -> tuple[float, ...] | None:
  try:
    return CFG_INTERVAL.value and tuple(map(float, CFG_INTERVAL.value))
  except ValueError:
    raise SettingError(
      "cfg_interval", ",".join(CFG_INTERVAL.value), "must be two numbers: LOW,HIGH"
    ) from None


def _path(value: str | None) -> Path | None:
  return None if value is None else Path(value)


if __name__ == "__main__":
  cli.run(main)
