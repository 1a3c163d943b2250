"""Diffusion processes, guidance and samplers, written for arrays and functions.

Nothing here depends on a network: a network is passed as a function.
"""

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.process import PROCESSES, Process, create_process

__all__ = ["PROCESSES", "GaussianDiffusion", "Process", "create_process"]
