"""Draws images from a checkpoint: python -m mdt_jax.sample --checkpoint=runs/digits

Writes OUTPUT/samples.npz (arr_0: uint8 NHWC images, arr_1: labels) and samples.png, a
grid of the first images with their labels. All devices of all processes draw. Flags
that are left out have the values of the training run. The same command resumes after a
stop. A network of latents without an autoencoder writes latents.npz (arr_0: float32)
and a preview.

--inpaint=IMAGE --mask=MASK paints the white part of the mask. --edit=IMAGE turns an
image into images of other classes.
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

import ast
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints.loading import workdir_of
from mdt_jax.data import file_names
from mdt_jax.errors import SettingError, check_range, renamed_in_errors
from mdt_jax.logs import logger
from mdt_jax.paths import output_folder
from mdt_jax.pretrained.hub import is_hub_url
from mdt_jax.sampling.conditions import (
  count_images,
  read_conditions,
  repeat_arrays,
)
from mdt_jax.sampling.labels import BALANCED, NONE, RANDOM, choose_labels
from mdt_jax.sampling.pipeline import Pipeline

CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Folder of a run of mdt_jax.main or of mdt_jax.convert, local or in a bucket "
  "(gs://...); or hf://ORG/NAME, a repository of mdt_jax.convert --push.",
  required=True,
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
LABELS = flags.DEFINE_list(
  "labels",
  BALANCED,
  "Classes to draw, in turn: numbers, or names of classes of the data or of ImageNet; "
  f"{BALANCED}: all classes of the data in turn; {RANDOM}: random classes of the data; "
  f"{NONE}: no class.",
)
CONDITION = flags.DEFINE_string(
  "condition",
  None,
  "File of conditions to draw, for runs of config.model.condition=vector or tokens: an "
  ".npz file with the arrays of the run by name, (N, ...), and label and caption (N,) "
  "if there are any. Default: none.",
)
NULL_CONDITION = flags.DEFINE_string(
  "null_condition",
  None,
  "File of the negative condition, from which guidance leads away, of the form of "
  "--condition, for one image or for all. Default: the null condition of training.",
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  "Number of images, at least 1. Default: one for each label; at most 100 for all "
  "classes.",
)
METHOD = flags.DEFINE_string(
  "method",
  None,
  "Sampler: ddpm, ddim, euler, heun, dpm++ or dpm++sde; for runs of flow or edm also "
  "ode_euler, ode_midpoint, ode_heun, ode_heun3, ode_rk4, sde, sde_heun and edm; not "
  "ddpm and ddim. Default: the run's.",
)
ARGUMENTS = flags.DEFINE_string(
  "arguments",
  None,
  "More arguments of the samplers sde, sde_heun and edm, as a dict in quotes: "
  "'{\"churn\": 40.0}'. Default: the run's, if the sampler is.",
)
NUM_STEPS = flags.DEFINE_integer(
  "num_steps",
  None,
  "Sampling steps, from 1 to config.diffusion.num_timesteps. Default: the run's.",
)
ALIASES = {"method": "sampler", "num_steps": "steps"}
for _name, _alias in ALIASES.items():
  cli.define_alias(_alias, _name)
SPACING = flags.DEFINE_string(
  "spacing",
  None,
  "How the times of the steps are spaced: uniform, log_snr or karras. Default: the "
  "run's, else the sampler's.",
)
ETA = flags.DEFINE_float(
  "eta",
  None,
  "Noise that ddim adds at each step, from 0 (none) to 1 (as ddpm). Default: the "
  "run's.",
)
CFG_SCALE = flags.DEFINE_float(
  "cfg_scale",
  None,
  "Scale of classifier-free guidance, at least 0; 1: no guidance. Default: the run's.",
)
CFG_POWER = flags.DEFINE_float(
  "cfg_power",
  None,
  "Power of the power-cosine schedule of the guidance scale, at least 0; 0: a constant "
  "scale. Default: the run's.",
)
CFG_CHANNELS = flags.DEFINE_integer(
  "cfg_channels",
  None,
  "Number of leading channels to guide; 0: all. Default: the run's.",
)
CFG_INTERVAL = flags.DEFINE_list(
  "cfg_interval",
  None,
  "LOW,HIGH: guide only where t / T lies in this interval, 0 <= LOW <= HIGH <= 1. "
  "Default: the run's.",
)
WEAK_CONDITION = flags.DEFINE_string(
  "weak_condition",
  None,
  "Condition of the weak pass of guidance: null, or same for sparse guidance. Default: "
  "the run's.",
)
STRONG_RATIO = flags.DEFINE_float(
  "strong_ratio",
  None,
  "Share of the tokens that the strong pass leaves out, in [0, 1). Default: the run's.",
)
WEAK_RATIO = flags.DEFINE_float(
  "weak_ratio",
  None,
  "Share of the tokens that the weak pass leaves out, in [strong_ratio, 1]; 1 drops "
  "the path of a SPRINT. Default: the run's.",
)
RATIO_SCHEDULE = flags.DEFINE_string(
  "ratio_schedule",
  None,
  "How these shares change: constant or cosine. Default: the run's.",
)
WEAK_CHECKPOINT = flags.DEFINE_string(
  "weak_checkpoint",
  None,
  "Run whose network guidance takes for the weak pass. Default: the network itself.",
)
WEAK_STEP = flags.DEFINE_integer(
  "weak_step", None, "Step of --weak_checkpoint. Default: the latest."
)
INPAINT = flags.DEFINE_string(
  "inpaint", None, "Image file to inpaint; needs --mask. Default: none."
)
MASK = flags.DEFINE_string(
  "mask", None, "Image file that is white where --inpaint paints. Default: none."
)
INTERPOLATION = flags.DEFINE_float(
  "interpolation",
  None,
  "Share of the process, counted from full noise, in which the side-interpolater "
  "predicts the hidden part, from 0 to 1. Default: 0.25.",
)
REPEATS = flags.DEFINE_integer(
  "repeats",
  None,
  "How often inpainting takes each step (RePaint), at least 1. Default: 1.",
)
EDIT = flags.DEFINE_string(
  "edit",
  None,
  "Image file to turn into images of the classes of --labels. Default: none.",
)
STRENGTH = flags.DEFINE_float(
  "strength",
  None,
  "How much --edit changes the image, above 0 and at most 1. Default: 0.6.",
)
VAE = flags.DEFINE_string(
  "vae",
  None,
  "Autoencoder that decodes latents to images: a folder or a Hugging Face id; none: "
  "do not decode. Default: the run's.",
)
SEED = flags.DEFINE_integer(
  "seed", 0, "Seed; the noise of image i derives from (seed, i)."
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Images that a device draws at once."
)
PNG = flags.DEFINE_bool("png", False, "Also write each image to OUTPUT/png.")
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder for the images. Default: CHECKPOINT/samples; with --inpaint "
  "CHECKPOINT/inpainted; with --edit CHECKPOINT/edited. Must be given with "
  "--checkpoint=hf://...",
)
OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace finished images of other settings in the folder."
)
cli.require(checkpoint="runs/digits")


def main(argv: list[str]) -> None:
  del argv
  check_range("num_images", NUM_IMAGES.value, 1, cli.MAX_IMAGES)
  check_range("batch_size", BATCH_SIZE.value, 1, cli.MAX_BATCH_SIZE)
  check_range("seed", SEED.value, 0, 2**32 - 1)
  if not is_hub_url(CHECKPOINT.value):
    cli.check_run_folder("checkpoint", CHECKPOINT.value, "step", accepts_parent=True)
  output = output_folder("output", _output())
  with renamed_in_errors(_flag_names()), contextlib.ExitStack() as stack:
    pipeline = Pipeline.load(
      CHECKPOINT.value, STEP.value, EMA_DECAY.value, vae=VAE.value
    )
    stack.enter_context(_with_files())
    condition, null = _conditions(pipeline)
    labels = _labels(pipeline, condition)
    file = pipeline.write(
      output,
      labels,
      condition=condition,
      null=null,
      png=PNG.value,
      overwrite=OVERWRITE.value,
      seed=SEED.value,
      batch_size=BATCH_SIZE.value,
      inpaint=INPAINT.value,
      mask=MASK.value,
      interpolation=INTERPOLATION.value,
      repeats=REPEATS.value,
      edit=EDIT.value,
      strength=STRENGTH.value,
      weak_checkpoint=WEAK_CHECKPOINT.value,
      weak_step=WEAK_STEP.value,
      **_sampling(),
    )
  logger.info("images of step %d: %s", pipeline.step, file)


@contextlib.contextmanager
def _with_files() -> Iterator[None]:
  """Context in which errors about the arrays of a file name the file."""
  files = {"condition": CONDITION.value, "null": NULL_CONDITION.value}
  try:
    yield
  except SettingError as error:
    file = files.get(error.setting)
    if file is None or error.value == file:
      raise
    accepted = f"{error.value!r}: {error.accepted}"
    raise SettingError(error.setting, file, accepted) from None


def _conditions(pipeline: Pipeline) -> tuple[Any, Any]:
  """Arrays of --condition and --null_condition, in turn for --num_images images."""
  conditioning, asked = pipeline.model.conditioning, NUM_IMAGES.value
  found: dict[str, Any] = {"condition": None, "null": None}
  counts = {}
  for setting, path in (("condition", CONDITION.value), ("null", NULL_CONDITION.value)):
    if path is not None:
      found[setting] = read_conditions(setting, path)
      with renamed_in_errors({"condition": setting}):
        counts[setting] = count_images(conditioning, found[setting])
  if asked is not None and "condition" in counts:
    count = counts["condition"]
    if asked < count:
      accepted = f"must be at least {count}, the number of images in --condition"
      raise SettingError("num_images", asked, accepted)
    if counts.get("null", 1) not in (1, count):
      accepted = f"must be given for one image or for all {count}"
      raise SettingError("null", counts["null"], accepted)
    for setting in counts:
      found[setting] = repeat_arrays(conditioning, found[setting], asked)
  return found["condition"], found["null"]


def _labels(pipeline: Pipeline, condition: Any) -> Any:
  """The label of each image; None if the condition has none, or holds them."""
  conditioning, arrays = pipeline.model.conditioning, condition or {}
  if conditioning.arrays():
    reason = None
    if conditioning.label is None:
      reason = "the network has no class labels"
    elif "label" in arrays:
      reason = "--condition holds labels"
    is_given = flags.FLAGS["labels"].present
    if reason and is_given:
      accepted = f"must be left out: {reason}"
      raise SettingError("labels", ",".join(LABELS.value), accepted)
    if reason or not is_given:
      return None
  count = NUM_IMAGES.value
  if count is None and arrays:
    count = count_images(conditioning, arrays)
    count = count if count > 1 else None
  return choose_labels(
    "labels",
    [file_names.from_path(label) for label in LABELS.value],
    count,
    pipeline.model.num_classes,
    SEED.value,
    has_null=pipeline.has_null_label,
    held=pipeline.experiment.data_labels,
  )


def _output() -> str | os.PathLike[str]:
  """The folder for the images: --output, or one in the run for images of this kind."""
  if OUTPUT.value is not None:
    return OUTPUT.value
  if is_hub_url(CHECKPOINT.value):
    raise SettingError("output", None, "must be given with --checkpoint=hf://...")
  name = "samples" if EDIT.value is None else "edited"
  if INPAINT.value is not None:
    name = "inpainted"
  return workdir_of(CHECKPOINT.value) / name


def _sampling() -> dict[str, Any]:
  """Settings of config.sampling that flags change."""
  flag_values = {
    "method": METHOD.value,
    "arguments": _arguments(),
    "num_steps": NUM_STEPS.value,
    "spacing": SPACING.value,
    "eta": ETA.value,
    "cfg_scale": CFG_SCALE.value,
    "cfg_power": CFG_POWER.value,
    "cfg_channels": CFG_CHANNELS.value,
    "cfg_interval": _interval(),
    "weak_condition": WEAK_CONDITION.value,
    "strong_ratio": STRONG_RATIO.value,
    "weak_ratio": WEAK_RATIO.value,
    "ratio_schedule": RATIO_SCHEDULE.value,
  }
  return {name: value for name, value in flag_values.items() if value is not None}


def _arguments() -> dict[str, Any] | None:
  text = ARGUMENTS.value
  if text is None:
    return None
  with contextlib.suppress(ValueError, TypeError, SyntaxError):
    found = ast.literal_eval(text)  # as --config.sampling.arguments is read
    if isinstance(found, dict):
      return found
  raise SettingError(
    "arguments", text, "must be a dict in quotes, such as '{\"churn\": 40.0}'"
  )


def _interval() -> tuple[float, ...] | None:
  texts = CFG_INTERVAL.value
  try:
    return None if texts is None else tuple(map(float, texts))
  except ValueError:
    raise SettingError(
      "cfg_interval", ",".join(texts or ()), "must be two numbers: LOW,HIGH"
    ) from None


def _flag_names() -> dict[str, str]:
  """Name of an argument in an error -> name of its flag, as the user typed it."""
  used = {name: alias for name, alias in ALIASES.items() if flags.FLAGS[alias].present}
  names = {"path": "checkpoint", "name": "checkpoint", "folder": "output"}
  return {**names, "null": "null_condition", **used}


if __name__ == "__main__":
  cli.run(main)
