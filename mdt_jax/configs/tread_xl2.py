"""TREAD-XL/2 on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/tread_xl2.py --workdir=runs/tread_xl2 \\
  --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: a TPU v4-64 or v5p-32, or 8 GPUs of 80 GB, with
--config.model.dtype=bfloat16.
As the released code (CompVis/tread), whose run is B/2: EDM, one route through blocks 2
to 24, which half of the tokens skip; 40 steps of Heun.
Paper (arXiv 2501.04765): FID after 400,000 steps of 256 images, 50,000 samples without
guidance (--config.sampling.cfg_scale=1): 7.38 with DiT, where DiT has 19.47; 4.89 with
SiT, where SiT has 17.20. The paper's network for SiT predicts velocities; here
--config.diffusion.process=flow with --config.sampling.method=ode_euler does so. The
released rectified flow counts times from the data and draws logit-normal times:
--config.diffusion.arguments='{"data_time": 0, "time_distribution": "logit_normal"}'.
Not reproduced with mdt_jax.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.tread("XL")
