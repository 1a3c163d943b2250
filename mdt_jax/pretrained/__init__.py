"""Pretrained models, and conversion of PyTorch checkpoints to and from flax."""

from mdt_jax.pretrained.torch_mdt import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
