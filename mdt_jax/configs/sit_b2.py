"""SiT-B/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/sit_b2.py --workdir=runs/sit_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-8 or v5e-8, or 8 GPUs, with
--config.model.dtype=bfloat16; the released runs are float32 with
products in TF32.
Paper: FID 33.0 after 400,000 steps, 50,000 samples without guidance.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sit("B")
