"""Checkpoints of PyTorch code, to our parameters and back."""

from mdt_jax.pretrained.torch_mdt import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
