"""MaskDiT-B/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/maskdit_b2.py --workdir=runs/maskdit_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-32 or v5e-32, or 8 GPUs of 80 GB, with
--config.model.dtype=bfloat16.
As the released run of XL/2 (Anima-Lab/MaskDiT): EDM, half of the tokens removed,
2,000,000 steps of 1,024 images, Adam with a learning rate of 1e-4, no flips; 40 steps
of Heun. The decoder is that of XL/2: 8 blocks of width 512 with 16 heads.
The released run goes on with up to 100,000 steps on all tokens, with a learning rate of
5e-5: a second run with --config.init.path=runs/maskdit_b2
--config.objective.unmasked_from=0 --config.num_steps=100000
--config.optimizer.learning_rate=5e-5. In one run,
--config.objective.unmasked_from=STEP trains on all tokens from STEP on, with the same
learning rate.
No FID of this size is stated in the released README.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.maskdit("B")
