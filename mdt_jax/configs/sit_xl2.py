"""SiT-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/sit_xl2.py --workdir=runs/sit_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-64 or v5p-32, or 8 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32 with
products in TF32.
Paper: FID 17.2 after 400,000 steps without guidance; 2.06 (IS 270.27) after 7 million
(--config.num_steps=7000000) with guidance, 50,000 samples.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sit("XL")
