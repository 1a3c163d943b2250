"""MDTv2-XL/2 on ImageNet 512x512, latents of 64x64x4.

python -m mdt_jax.main --config=configs/mdtv2_xl2_512.py --workdir=runs/mdtv2_xl2_512 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 512x512 images (docs/data.md).
Hardware: a TPU v4-128 or v5p-64, or 64 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32.
Paper: no FID is published at this size.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdtv2("XL", input_size=64)
