"""Processes, guidance and samplers; they take arrays and functions, never a network."""

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.process import PROCESSES, Process, create_process

__all__ = ["PROCESSES", "GaussianDiffusion", "Process", "create_process"]
