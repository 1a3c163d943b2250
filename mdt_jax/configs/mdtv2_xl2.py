"""MDTv2-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/mdtv2_xl2.py --workdir=runs/mdtv2_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-64 or v5p-32, or 32 GPUs of 80 GB, with
--config.model.dtype=bfloat16; the released runs are float32.
Paper: FID 7.70 after 400,000 steps without guidance; 1.58 (IS 314.73) after the whole
training with guidance, 50,000 samples.
Not reproduced with mdt_jax. The released run_ddp_master.sh has 4 x 8 GPUs, the released
README 8 x 8.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdtv2("XL")
