"""SiT-S/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/sit_s2.py --workdir=runs/sit_s2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: one TPU v4-8 or one GPU of 24 GB, with
--config.model.dtype=bfloat16; the released runs are float32 with
products in TF32.
The paper compares this size with that of DiT after 400,000 steps.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sit("S")
