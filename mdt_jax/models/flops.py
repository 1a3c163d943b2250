"""Floating-point operations of a network, counted from its attributes.

The count holds matrix products alone, with two operations for each multiply and add:
the convention of MFU in the field. XLA's cost analysis does not serve here, because it
counts the body of a rolled loop once.
"""

from __future__ import annotations

from mdt_jax.models.registry import Model, network_of


def forward_flops(model: Model, num_keep: int | None = None) -> int:
  """Operations of a forward pass over one image.

  Args:
    model: the network.
    num_keep: tokens that the encoder sees in a masked pass; None for all.
  """
  return network_of(model).forward_flops(model, num_keep)


def train_flops(model: Model, num_keep: int | None = None) -> int:
  """Operations of a training step on one image; a backward pass counts as two forwards.

  Args:
    model: the network.
    num_keep: tokens kept in the masked pass; None for no masked pass.
  """
  passes = forward_flops(model)
  if num_keep is not None:
    passes += forward_flops(model, num_keep)
  return 3 * passes
