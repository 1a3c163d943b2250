"""The diffusion process, guidance and samplers; they take arrays and functions."""

from mdt_jax.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
