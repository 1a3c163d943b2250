"""Converts checkpoints of the released PyTorch code, and back.

python -m mdt_jax.convert --input=mdt_xl2_v2_ckpt.pt --output=DIR
python -m mdt_jax.convert --process=flow --input=SiT-XL-2-256x256.pt --output=DIR
python -m mdt_jax.convert --network=TREAD --input=model.pt --output=DIR
python -m mdt_jax.convert --to_torch --input=WORKDIR --output=model.safetensors
python -m mdt_jax.convert --inception --input=FILE.pth --output=inception.safetensors
python -m mdt_jax.convert --push=ORG/NAME --input=WORKDIR
python -m mdt_jax.convert --to_hub --input=WORKDIR --output=FOLDER

The first command writes a run's folder, from which mdt_jax.sample draws images. The
second and third do so for a SiT and a TREAD, whose tensors look like those of a DiT.
--to_torch writes averaged parameters of a run under the released names and shapes.
--inception converts the weights of FID's network (a file of pytorch-fid or
torch-fidelity, or the frozen graph, .pb) for mdt_jax.evaluate.
--push uploads averaged parameters of a run, its settings and a model card to the
Hugging Face hub, from which Pipeline.from_pretrained loads them; --to_hub writes these
files to a folder. --input and --output may lie in a bucket (gs://…).
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints import converted, hub_uploads
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.logs import logger
from mdt_jax.paths import any_path
from mdt_jax.pretrained import torch_inception, torch_vae

INPUT = flags.DEFINE_string(
  "input",
  None,
  "File to convert, or folder of a DiT in diffusers' format; with --to_torch, --push "
  "or --to_hub, the folder of a run.",
  required=True,
)
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder to write, for --checkpoint of mdt_jax.sample; with --to_torch or "
  "--inception, a file; with --to_hub, a folder for Pipeline.from_pretrained. Needed "
  "unless --push is given.",
)
TO_TORCH = flags.DEFINE_bool(
  "to_torch", False, "Convert a run to a .pt, .pth or .safetensors file."
)
INCEPTION = flags.DEFINE_bool(
  "inception", False, "Convert the weights of FID's Inception network."
)
PUSH = flags.DEFINE_string(
  "push",
  None,
  "Upload averaged parameters of a run to this repository, ORG/NAME, on the Hugging "
  "Face hub, with its settings and a model card. Paths of this machine are left out. "
  "Needs huggingface_hub and a login (hf auth login, or HF_TOKEN). Default: no "
  "upload.",
)
TO_HUB = flags.DEFINE_bool(
  "to_hub",
  False,
  "Write the folder that --push uploads: model.safetensors, config.json and README.md.",
)
PRIVATE = flags.DEFINE_bool(
  "private", False, "With --push: make a new repository private."
)
LICENSE = flags.DEFINE_string(
  "license",
  None,
  "With --push or --to_hub: license in the model card, as the hub names it, such as "
  "apache-2.0. Default: the card states no license.",
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --output holds.")
NETWORK = flags.DEFINE_string(
  "network",
  None,
  "Network in the PyTorch file, such as DiT, SiT, MDTv2 or TREAD. A TREAD needs "
  "the flag unless the file names it. Default: found from the tensors, and from "
  "--process for a SiT.",
)
PROCESS = flags.DEFINE_string(
  "process",
  None,
  "Process that trained the network in the PyTorch file: gaussian (DDPM), flow or edm. "
  "With flow, a DiT whose last layer has twice the channels is read as a SiT. Default: "
  "what the file states, else that of the paper: flow for a SiT or SPRINT, edm for a "
  "TREAD, a MaskDiT and a MicroDiT that learns no variance, gaussian for others. The "
  "flow of a TREAD or SPRINT is that of its released code: the network gets time 0 for "
  "data.",
)
DECODE_DEPTH = flags.DEFINE_integer(
  "decode_depth",
  None,
  "Number of decoder blocks of an MDT v1. Default: 2, as released.",
)
NUM_HEADS = flags.DEFINE_integer(
  "num_heads",
  None,
  "Number of attention heads of a DiT, SiT, TREAD, MaskDiT or MicroDiT. Default: that "
  "of the published size.",
)
MIXER_NUM_HEADS = flags.DEFINE_integer(
  "mixer_num_heads",
  None,
  "Number of attention heads of the mixer of a MicroDiT. Default: what the file "
  "states, else heads as large as those of the other blocks.",
)
DECODER_NUM_HEADS = flags.DEFINE_integer(
  "decoder_num_heads",
  None,
  "Number of attention heads of the decoder of a MaskDiT. Default: 16 for the released "
  "width of 512.",
)
NUM_CLASSES = flags.DEFINE_integer(
  "num_classes",
  None,
  "Number of classes, without the null label. Give it if the network was trained "
  "without label dropout (class_dropout_prob=0 in the released code): its label table "
  "has no row for the null label, which the file does not show. Default: what the file "
  "states, else one less than the rows of the table.",
)
INPUT_SIZE = flags.DEFINE_integer(
  "input_size",
  None,
  "Height and width of the latents of a DiT in diffusers' format, or of a SPRINT. "
  "Default: sample_size of config.json beside the file, or what the file states.",
)
STEP = flags.DEFINE_integer(
  "step",
  None,
  "With --to_torch, --push or --to_hub: step of the checkpoint. Default: the latest.",
)
EMA_DECAY = flags.DEFINE_float(
  "ema_decay",
  None,
  "With --to_torch, --push or --to_hub: decay of the averaged parameters, one of "
  "config.ema_decays. Default: config.sampling.ema_decay of the run, else the first.",
)
cli.require(input="mdt_xl2_v2_ckpt.pt")
cli.suggest({"checkpoint": "--input"})


# Name of an argument in an error -> name of its flag.
_FROM_TORCH = {"path": "input", "workdir": "output"}
_TO_TORCH = {"workdir": "input", "path": "output"}
_INCEPTION = {"source": "input", "target": "output"}
_TO_HUB = {"workdir": "input", "folder": "output", "repository": "push"}


def main(argv: list[str]) -> None:
  del argv
  repository, output = PUSH.value, None
  if repository is None:
    output = any_path("output", cli.required_value(OUTPUT, "runs/mdt_xl2"))
  _check_direction()
  published = {
    "step": STEP.value,
    "ema_decay": EMA_DECAY.value,
    "license": LICENSE.value,
  }
  if repository is not None:
    with renamed_in_errors(_TO_HUB):
      step = hub_uploads.push_to_hub(
        INPUT.value, repository, private=PRIVATE.value, **published
      )
    logger.info(
      "step %d of %s: https://huggingface.co/%s", step, INPUT.value, repository
    )
    return
  assert output is not None
  if TO_HUB.value:
    with renamed_in_errors(_TO_HUB):
      step = hub_uploads.to_hub_folder(
        INPUT.value, output, overwrite=OVERWRITE.value, **published
      )
    logger.info("step %d of %s: %s", step, INPUT.value, output)
  elif INCEPTION.value:
    with renamed_in_errors(_INCEPTION):
      torch_inception.convert_inception(INPUT.value, output, overwrite=OVERWRITE.value)
    logger.info("%s", output)
  elif TO_TORCH.value:
    with renamed_in_errors(_TO_TORCH):
      step = converted.to_torch_file(
        INPUT.value,
        output,
        overwrite=OVERWRITE.value,
        step=STEP.value,
        ema_decay=EMA_DECAY.value,
      )
    logger.info("step %d of %s: %s", step, INPUT.value, output)
  else:
    with renamed_in_errors(_FROM_TORCH):
      settings = converted.from_torch_file(
        INPUT.value,
        output,
        NETWORK.value,
        overwrite=OVERWRITE.value,
        decode_depth=DECODE_DEPTH.value,
        num_heads=NUM_HEADS.value,
        mixer_num_heads=MIXER_NUM_HEADS.value,
        decoder_num_heads=DECODER_NUM_HEADS.value,
        num_classes=NUM_CLASSES.value,
        input_size=INPUT_SIZE.value,
        process=PROCESS.value,
      )
    # Other numbers of channels are pixels, or latents of another autoencoder.
    vae = f" --vae={torch_vae.DEFAULT_ID}" if settings.model.in_channels == 4 else ""
    # Labels have a default.
    more = "" if settings.model.condition == "label" else " --condition=FILE.npz"
    logger.info(
      "%s: python -m mdt_jax.sample --checkpoint=%s%s%s",
      settings.model.name,
      output,
      vae,
      more,
    )


def _check_direction() -> None:
  """Refuses flags of several directions, and an input of another direction."""
  path = any_path("input", INPUT.value)
  directions = {
    "push": PUSH.value,
    "to_hub": TO_HUB.value,
    "to_torch": TO_TORCH.value,
    "inception": INCEPTION.value,
  }
  given = [name for name, value in directions.items() if value not in (None, False)]
  if len(given) > 1:
    last = given[-1]
    raise SettingError(last, directions[last], f"cannot be combined with --{given[0]}")
  direction = given[0] if given else None
  to_hub = direction in ("push", "to_hub")
  if direction == "push" and OUTPUT.value is not None:
    raise SettingError(
      "output", OUTPUT.value, "cannot be combined with --push; --to_hub writes a folder"
    )
  for name, value, fits, needed in (
    ("private", PRIVATE.value, direction == "push", "--push"),
    ("license", LICENSE.value, to_hub, "--push or --to_hub"),
  ):
    if value and not fits:
      raise SettingError(name, value, f"needs {needed}")
  reads_run = to_hub or direction == "to_torch"
  if reads_run and path.is_file():
    raise SettingError(
      "input",
      INPUT.value,
      f"is a file, and --{direction} takes the folder of a run; leave it out to "
      "convert a PyTorch file",
    )
  if direction != "inception":
    cli.check_run_folder("input", INPUT.value, "step", accepts_parent=reads_run)
  if not reads_run and cli.is_run(path):
    raise SettingError(
      "input",
      INPUT.value,
      "is the folder of a run; did you mean --to_torch, with a file as --output, or "
      "--push=ORG/NAME?",
    )


if __name__ == "__main__":
  cli.run(main)
