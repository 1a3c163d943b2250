"""MDTv2-B/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/mdtv2_b2.py --workdir=runs/mdtv2_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-8 or v5e-8, or 8 GPUs, with
--config.model.dtype=bfloat16; the released runs are float32.
Paper: FID 19.55 after 400,000 steps, 50,000 samples without guidance.
Not reproduced with mdt_jax.

No decode_depth is published for B/2; 6 is that of S/2, which has as many blocks.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdtv2("B")
