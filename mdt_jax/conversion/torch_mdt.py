"""Old name of `mdt_jax.pretrained.torch_mdt`."""

from mdt_jax.pretrained.torch_mdt import from_tensors, from_torch, to_torch

__all__ = ["from_tensors", "from_torch", "to_torch"]
