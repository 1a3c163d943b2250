"""MDT-L/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/mdt_l2.py --workdir=runs/mdt_l2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-32 or 8 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32.
Paper: no FID is published.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdt("L")
