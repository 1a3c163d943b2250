"""Diffusion processes, guidance and samplers, written for arrays and functions.

Nothing here depends on a network: a network is passed as a function.
"""

from mdt_jax.diffusion.edm import EDM
from mdt_jax.diffusion.flow import Flow
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.process import PROCESSES, Process, create_process

__all__ = [
  "EDM",
  "PROCESSES",
  "Flow",
  "GaussianDiffusion",
  "Process",
  "create_process",
]
