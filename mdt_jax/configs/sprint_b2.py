"""SPRINT-B/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/sprint_b2.py --workdir=runs/sprint_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-8 or v5e-8, or 8 GPUs, with
--config.model.dtype=bfloat16.
As the released code (snap-research/Sprint), whose run is XL/2: 2 blocks on all tokens,
8 on a quarter of the tokens, 2 on all; velocities of a flow, logit-normal times. The
last 200,000 of 2,200,000 steps train on all tokens; see configs/sprint_xl2.py. A
shorter run sets config.num_steps and config.objective.unmasked_from.
Paper (arXiv 2510.21986), its ablation as a note on the paper gives it: FID 27.5, and
30.1 where the kept tokens are drawn from the whole image
(--config.model.mask_type=random). Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sprint("B")
