"""Draws images from a checkpoint: python -m mdt_jax.sample --checkpoint=WORKDIR

All devices of all processes draw. The images go to OUTPUT/samples.npz (arr_0 uint8
NHWC, arr_1 labels), and the first of them to samples.png, a grid with labels. The same
command resumes a stopped run. Settings that are left out are those of the training run.
A model of latents without an autoencoder writes latents.npz (arr_0 float32) and a
preview.

--inpaint=IMAGE --mask=MASK paints the white part of the mask. --edit=IMAGE turns an
image into an image of another class.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints.loading import workdir_of
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.logs import logger
from mdt_jax.sampling.labels import BALANCED, NONE, RANDOM, choose_labels
from mdt_jax.sampling.pipeline import Pipeline

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: latest.")
EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Decay of the averaged parameters; default: the run's."
)
LABELS = flags.DEFINE_list(
  "labels",
  BALANCED,
  f"Classes to draw in turn, by number or by ImageNet's name; {NONE}: no class; "
  f"{BALANCED}: all classes in turn; {RANDOM}: random classes.",
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  "Number of images; default: one for each label, at most 100 for all classes.",
)
METHOD = flags.DEFINE_string(
  "method", None, "Sampler: ddpm, ddim, euler, heun, dpm++ or dpm++sde."
)
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Sampling steps.")
ALIASES = {"method": "sampler", "num_steps": "steps"}
for _name, _alias in ALIASES.items():
  flags.DEFINE_alias(_alias, _name)
SPACING = flags.DEFINE_string("spacing", None, "uniform, log_snr or karras.")
ETA = flags.DEFINE_float("eta", None, "Noise of ddim, from 0 to 1.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance scale; 1: no guidance.")
CFG_POWER = flags.DEFINE_float(
  "cfg_power", None, "Power of the power-cosine scale; 0: a constant scale."
)
CFG_CHANNELS = flags.DEFINE_integer(
  "cfg_channels", None, "Number of leading channels to guide; 0: all."
)
CFG_INTERVAL = flags.DEFINE_list(
  "cfg_interval", None, "LOW,HIGH: guide where t / T lies in this interval."
)
INPAINT = flags.DEFINE_string("inpaint", None, "Image to paint in.")
MASK = flags.DEFINE_string("mask", None, "Image that is white where to paint.")
INTERPOLATION = flags.DEFINE_float(
  "interpolation",
  None,
  "Share of the process, counted from full noise, in which the side-interpolater "
  "predicts the hidden part; default: 0.25.",
)
REPEATS = flags.DEFINE_integer(
  "repeats", None, "How often each step of inpainting is taken (RePaint); default: 1."
)
EDIT = flags.DEFINE_string("edit", None, "Image to turn into other classes.")
STRENGTH = flags.DEFINE_float(
  "strength", None, "How much the edit changes, above 0 and up to 1; default: 0.6."
)
VAE = flags.DEFINE_string(
  "vae",
  None,
  "Folder or hub id of the autoencoder that decodes latents; none: do not decode; "
  "default: the run's.",
)
SEED = flags.DEFINE_integer("seed", 0, "Image i derives from (seed, i).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images drawn at once on a device.")
PNG = flags.DEFINE_bool("png", False, "Also write a folder of PNGs.")
OUTPUT = flags.DEFINE_string("output", None, "Folder; default: WORKDIR/samples.")


def main(argv: list[str]) -> None:
  del argv
  if NUM_IMAGES.value is not None and NUM_IMAGES.value < 1:
    raise SettingError("num_images", NUM_IMAGES.value, "must be at least 1")
  with renamed_in_errors(_flag_names()):
    pipeline = Pipeline.from_checkpoint(
      CHECKPOINT.value, STEP.value, EMA_DECAY.value, vae=VAE.value
    )
    labels = choose_labels(
      "labels",
      LABELS.value,
      NUM_IMAGES.value,
      pipeline.model.num_classes,
      SEED.value,
      has_null=pipeline.has_null_label,
    )
    file = pipeline.write(
      OUTPUT.value or workdir_of(CHECKPOINT.value) / "samples",
      labels,
      png=PNG.value,
      seed=SEED.value,
      batch_size=BATCH_SIZE.value,
      inpaint=INPAINT.value,
      mask=MASK.value,
      interpolation=INTERPOLATION.value,
      repeats=REPEATS.value,
      edit=EDIT.value,
      strength=STRENGTH.value,
      **_sampling(),
    )
  logger.info("%d images of step %d: %s", len(labels), pipeline.step, file)


def _sampling() -> dict[str, Any]:
  """The settings of config.sampling that the flags change."""
  flag_values = {
    "method": METHOD.value,
    "num_steps": NUM_STEPS.value,
    "spacing": SPACING.value,
    "eta": ETA.value,
    "cfg_scale": CFG_SCALE.value,
    "cfg_power": CFG_POWER.value,
    "cfg_channels": CFG_CHANNELS.value,
    "cfg_interval": _interval(),
  }
  return {name: value for name, value in flag_values.items() if value is not None}


def _interval() -> tuple[float, ...] | None:
  texts = CFG_INTERVAL.value
  try:
    return None if texts is None else tuple(map(float, texts))
  except ValueError:
    raise SettingError(
      "cfg_interval", ",".join(texts or ()), "must be two numbers: LOW,HIGH"
    ) from None


def _flag_names() -> dict[str, str]:
  """Names of arguments in errors -> names of flags, as the user typed them."""
  used = {name: alias for name, alias in ALIASES.items() if flags.FLAGS[alias].present}
  return {"path": "checkpoint", "folder": "output", **used}


if __name__ == "__main__":
  cli.run(main)
