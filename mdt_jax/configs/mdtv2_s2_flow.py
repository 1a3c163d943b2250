"""MDTv2-S/2 as a flow model on ImageNet 256x256, latents of 32x32x4.

python -m mdt_jax.main --config=configs/mdtv2_s2_flow.py \\
  --workdir=runs/mdtv2_s2_flow --config.data.path=LATENTS

LATENTS: folder that python -m mdt_jax.encode wrote from 256x256 images (docs/data.md).
Hardware: as configs/mdtv2_s2.py.
A recipe of mdt_jax, not of a paper: network, masks and optimizer of MDTv2; linear path
and velocity of SiT; logit-normal times of Stable Diffusion 3 (arXiv 2403.03206).
Not run at this size.
"""

from ml_collections import ConfigDict

from mdt_jax import recipes


def get_config() -> ConfigDict:
  return recipes.mdtv2_flow("S")
