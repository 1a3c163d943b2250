"""MDT-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/mdt_xl2.py --workdir=runs/mdt_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-64 or v5p-32, or 32 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32.
Paper: FID 16.42 after 400,000 steps and 6.23 after 6.5 million without guidance; 1.79
(IS 283.01) with it, 50,000 samples.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdt("XL")
