"""DiT-XL/2 on ImageNet 512x512, latents of 64x64x4.

python -m mdt_jax.main --config=configs/dit_xl2_512.py --workdir=runs/dit_xl2_512 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 512x512 images (docs/data.md).
Hardware: a TPU v4-128 or v5p-64, or 64 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32 with
products in TF32.
Paper: FID 3.04 (IS 240.82) after 3 million steps with guidance (constant scale 1.5),
50,000 samples. Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.dit("XL", input_size=64)
