"""SPRINT-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/sprint_xl2.py --workdir=runs/sprint_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-64 or v5p-32, or 8 GPUs of 80 GB, with
--config.model.dtype=bfloat16.
As the released run (snap-research/Sprint): 2 blocks on all tokens, 24 on a quarter of
the tokens, 2 on all; velocities of a flow, logit-normal times; 2,000,000 steps, then
200,000 on all tokens. The released last phase has a batch of 1,024, a learning rate of
2e-4 and a warm-up of 5,000 steps; here the last phase has those of the first. To
reproduce it, train for 2,000,000 steps with --config.objective.unmasked_from=None, and
start a second run from these weights with --config.init.path (docs/finetune.md),
--config.objective.arguments='{"ratio": 0, "path_drop": 0.1}' and those settings.
Samples: 250 steps of the SDE, as released. The released scale 3 is that of guidance by
path drop; the scale 1.5 here is that of SiT, for classifier-free guidance.
Release (README): FID 1.62 and FDD 58.4 with guidance by path drop, 1.96 and 75.4 with
classifier-free guidance. Paper (arXiv 2510.21986), as a note on it gives it: FID 9.30
after 400,000 steps without guidance, where SiT has 12.8. Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sprint("XL")
