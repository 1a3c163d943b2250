"""Logical axes of a network's arrays, for sharding over devices.

Inside `sharding.use_mesh` an axis name means axes of the mesh; elsewhere the names have
no effect. "batch": examples. "width": the axis along which parameters are sharded at
rest. "heads" and "hidden": axes of the computation on one image that devices share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import flax.linen as nn
from flax.linen.spmd import with_logical_constraint
from jax.custom_derivatives import linear_call

from mdt_jax.types import Array

Axes: TypeAlias = tuple[str | None, ...]

# End of a parameter's path -> its axes, without the leading axis of stacked blocks.
# Parameters that match no row, mostly biases, are replicated: 1 part in 1,000.
PARAMETER_AXES: Mapping[str, Axes] = {
  "patch_embed/linear/kernel": (None, "width"),
  "timestep_embed/fc1/kernel": (None, "width"),
  "timestep_embed/fc2/kernel": (None, "width"),
  "label_embed/table": (None, "width"),
  "pos_embed": (None, "width"),  # and decode_pos_embed
  "qkv/kernel": ("width", None, "heads", None),
  "qkv/bias": (None, "heads", None),
  "proj/kernel": ("heads", None, "width"),
  "relative_position_bias": (None, "heads"),
  "skip/kernel": (None, "width"),
  "modulation/linear/kernel": (None, "width"),
  "fc1/kernel": ("width", "hidden"),
  "fc1/bias": ("hidden",),
  "fc2/kernel": ("hidden", "width"),
  "final_layer/linear/kernel": ("width", None),
}


def parameter_axes(path: str) -> Axes:
  """Axes of the parameter at `path`: those of the first row that ends the path.

  Args:
    path: names joined by "/", such as "blocks/attention/qkv/kernel".

  Returns:
    Axes without the leading axis of stacked blocks; () for a replicated parameter.
  """
  return next((axes for end, axes in PARAMETER_AXES.items() if path.endswith(end)), ())


def shard_batch(x: Array) -> Array:
  """Shards the first axis over the devices that share a batch."""
  return with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))


def gather(parameter: Array, axes: Sequence[str | None]) -> Array:
  """Gathers a parameter along "width", the axis along which it is sharded at rest."""
  return with_logical_constraint(
    parameter, tuple(None if axis == "width" else axis for axis in axes)
  )


def gather_kernel(kernel: Array, axes: Sequence[str | None]) -> Array:
  """As `gather`, with a gradient that is reduced and scattered in one operation.

  Left to itself, XLA sums the whole gradient on each device and then cuts out the
  device's part, which moves twice as many bytes.
  """
  if not nn.get_logical_axis_rules():
    return kernel
  return linear_call(
    lambda _, whole: gather(whole, axes),
    lambda _, gradient: with_logical_constraint(gradient, tuple(axes)),
    (),
    kernel,
  )
