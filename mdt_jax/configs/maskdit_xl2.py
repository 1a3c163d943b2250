"""MaskDiT-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/maskdit_xl2.py --workdir=runs/maskdit_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v5p-32, or 8 GPUs of 80 GB with --config.accumulation_steps=4; with
--config.model.dtype=bfloat16.
As the released run (Anima-Lab/MaskDiT): EDM, half of the tokens removed, 2,000,000
steps of 1,024 images, Adam with a learning rate of 1e-4, no flips; 40 steps of Heun.
The released run is in fp16.
The released run goes on with up to 100,000 steps on all tokens, with a learning rate of
5e-5 and without fp16: a second run with --config.init.path=runs/maskdit_xl2
--config.objective.unmasked_from=0 --config.num_steps=100000
--config.optimizer.learning_rate=5e-5. In one run,
--config.objective.unmasked_from=STEP trains on all tokens from STEP on, with the same
learning rate.
Released README: FID 2.28 with guidance, 5.69 without
(--config.sampling.cfg_scale=1); at 512x512 (1,000,000 steps, then up to 50,000 on all
tokens) 2.50 and 10.79.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.maskdit("XL")
