"""TREAD-B/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/tread_b2.py --workdir=runs/tread_b2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-8 or v5e-8, or 8 GPUs, with
--config.model.dtype=bfloat16.
As the released run (CompVis/tread): EDM, one route through blocks 2 to 8, which half of
the tokens skip; 40 steps of Heun.
Paper (arXiv 2501.04765): FID after 400,000 steps of 256 images, 50,000 samples without
guidance (--config.sampling.cfg_scale=1): 21.34 with DiT, where DiT has 43.47; 15.98
with SiT, where SiT has 33.00. The paper's network for SiT predicts velocities; here
--config.diffusion.process=flow with --config.sampling.method=ode_euler does so. The
released rectified flow counts times from the data and draws logit-normal times:
--config.diffusion.arguments='{"data_time": 0, "time_distribution": "logit_normal"}'.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.tread("B")
