"""MicroDiT-B/2 on ImageNet 256x256 with class labels, latents of 32x32x4.

python -m mdt_jax.main --config=configs/microdit_b2.py --workdir=runs/microdit_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-8 or v5e-8, or 8 GPUs, with
--config.model.dtype=bfloat16.
The method of the paper (arXiv 2407.15811), deferred masking, on DiT and labels. The
paper's runs train another network on captions (SonyResearch/micro_diffusion): with
cross-attention, SwiGLU, experts and blocks of rising width, of other sizes. As there:
batches of 2,048; 250,000 steps with 75% of the tokens removed, then 30,000 with all;
AdamW with a weight decay of 0.1, gradients clipped to 0.25, 2,500 steps of warmup to
2.4e-4; EDM with sigma_data 0.9 and ln(sigma) from N(-0.6, 1.2^2); 30 steps of Heun.
Here the learning rate then stays; there it falls by a cosine to a third, and is 8e-5 in
the unmasked steps. The paper's guidance scale of 5 is for captions; here it is 1.5.
Released figures, of that network: FID 12.66 on COCO, trained on 37 million images, and
12.72 on 22 million (its README).
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.microdit("B")
