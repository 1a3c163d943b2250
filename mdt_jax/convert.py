"""Converts checkpoints of the released PyTorch code, and back.

python -m mdt_jax.convert --input=mdt_xl2_v2_ckpt.pt --output=DIR
python -m mdt_jax.convert --to_torch --input=WORKDIR --output=model.safetensors
python -m mdt_jax.convert --inception --input=FILE.pth --output=inception.safetensors

DIR is a workdir that mdt_jax.sample takes; its --vae decodes. Back, the averaged
parameters are written under the released names and shapes, to a .pt, .pth or
.safetensors file. With --inception the weights of FID's network, as pytorch-fid and
torch-fidelity have them or in the frozen graph (.pb) that they come from, become a file
for mdt_jax.evaluate.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints import converted
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
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --output holds.")
DECODE_DEPTH = flags.DEFINE_integer(
  "decode_depth", None, "Decode blocks of an MDT v1; 2, as released, by default."
)
NUM_HEADS = flags.DEFINE_integer(
  "num_heads", None, "Heads of a DiT; those of the published sizes by default."
)
STEP = flags.DEFINE_integer("step", None, "Step to convert back; the latest.")
EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Average to convert back.")


def main(argv: list[str]) -> None:
  del argv
  output = Path(OUTPUT.value)
  if INCEPTION.value:
    torch_inception.convert_inception(INPUT.value, output, overwrite=OVERWRITE.value)
    logger.info("%s", output)
  elif TO_TORCH.value:
    step = converted.to_torch_file(
      INPUT.value,
      output,
      overwrite=OVERWRITE.value,
      step=STEP.value,
      ema_decay=EMA_DECAY.value,
    )
    logger.info("step %d of %s: %s", step, INPUT.value, output)
  else:
    settings = converted.from_torch_file(
      INPUT.value,
      output,
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
