"""Converts checkpoints of the released PyTorch code, and back.

python -m mdt_jax.convert --input=mdt_xl2_v2_ckpt.pt --output=DIR
python -m mdt_jax.convert --to_torch --input=WORKDIR --output=model.safetensors
python -m mdt_jax.convert --inception --input=FILE.pth --output=inception.safetensors

The first command writes a workdir for mdt_jax.sample, whose --vae decodes the samples.
--to_torch writes averaged parameters under the released names and shapes, to a .pt,
.pth or .safetensors file. --inception converts the weights of FID's network (a file of
pytorch-fid or torch-fidelity, or the frozen graph, .pb) for mdt_jax.evaluate.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints import converted
from mdt_jax.errors import renamed_in_errors
from mdt_jax.logs import logger
from mdt_jax.pretrained import torch_inception, torch_vae

INPUT = flags.DEFINE_string(
  "input", None, "File; with --to_torch a workdir.", required=True
)
OUTPUT = flags.DEFINE_string(
  "output", None, "Workdir; with --to_torch a file.", required=True
)
TO_TORCH = flags.DEFINE_bool("to_torch", False, "From a workdir to a PyTorch file.")
INCEPTION = flags.DEFINE_bool("inception", False, "Weights of FID's network.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is in --output.")
NETWORK = flags.DEFINE_string(
  "network", None, "DiT, MDT or MDTv2; inferred from the tensors by default."
)
DECODE_DEPTH = flags.DEFINE_integer(
  "decode_depth", None, "Decode blocks of an MDT v1; 2, as released, by default."
)
NUM_HEADS = flags.DEFINE_integer(
  "num_heads", None, "Heads of a DiT; those of the published size by default."
)
STEP = flags.DEFINE_integer("step", None, "Step to convert back; default: the latest.")
EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Decay of the average to convert back."
)


# Argument in an error -> flag, where their names differ.
_FROM_TORCH = {"path": "input", "workdir": "output"}
_TO_TORCH = {"workdir": "input", "path": "output"}
_INCEPTION = {"source": "input", "target": "output"}


def main(argv: list[str]) -> None:
  del argv
  output = Path(OUTPUT.value)
  if INCEPTION.value:
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
      )
    logger.info(
      "%s: python -m mdt_jax.sample --checkpoint=%s --vae=%s",
      settings.model.name,
      output,
      torch_vae.DEFAULT_ID,
    )


if __name__ == "__main__":
  cli.run(main)
