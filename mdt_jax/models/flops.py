"""Counts the floating-point operations of a network from its attributes.

Only matrix products count, and a multiply-add counts as two operations: the usual
convention for MFU (model FLOPs utilisation). XLA's cost analysis cannot be used,
because it counts the body of a loop only once.
"""

from __future__ import annotations

from mdt_jax.models.registry import Model, network_of


def forward_flops(model: Model, num_keep: int | None = None) -> int:
  """Counts the operations of a forward pass over one image.

  Args:
    model: the network.
    num_keep: number of tokens that the encoder, or the route, sees; None for a pass
      without a token mask.

  Raises:
    SettingError: the network has no entry in `models.registry.NETWORKS`.
  """
  return network_of(model).forward_flops(model, num_keep)


def train_flops(model: Model, num_keep: int | None = None) -> int:
  """Counts the operations of a training step on one image.

  A backward pass counts as two forward passes.

  Args:
    model: the network.
    num_keep: number of tokens kept in the additional masked pass; None if the step has
      no masked pass.

  Raises:
    SettingError: the network has no entry in `models.registry.NETWORKS`.
  """
  passes = forward_flops(model)
  if num_keep is not None:
    passes += forward_flops(model, num_keep)
  return 3 * passes
