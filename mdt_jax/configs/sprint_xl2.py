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
reproduce it, end the first run with --config.num_steps=2000000 and start a second run,
with its own --workdir, from the averaged parameters:
--config.init.path=runs/sprint_xl2 --config.num_steps=200000
--config.objective.unmasked_from=0 --config.batch_size=1024
--config.optimizer.learning_rate=2e-4 --config.optimizer.warmup_steps=5000.
A shorter run sets --config.num_steps and --config.objective.unmasked_from.
Samples: 250 steps of the SDE with path-drop guidance of scale 3, as released.
Release (README): FID 1.62 and FDD 58.4 with guidance by path drop, 1.96 and 75.4 with
classifier-free guidance. Paper (arXiv 2510.21986), as a note on it gives it: FID 9.30
after 400,000 steps without guidance, where SiT has 12.8. Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.sprint("XL")
