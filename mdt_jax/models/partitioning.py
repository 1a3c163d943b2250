"""Logical axis names of a network's arrays, for sharding over devices.

Inside `sharding.use_mesh`, `sharding.RULES` maps each name to axes of the device mesh.
Outside, the names have no effect.

  "batch": examples.
  "width": the axis along which stored parameters are sharded (FSDP).
  "heads", "hidden": attention heads and hidden units of the MLP (tensor parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import flax.linen as nn
import jax
from flax.linen.spmd import logical_to_mesh_axes, with_logical_constraint
from jax.custom_derivatives import linear_call
from jax.sharding import AbstractMesh, PartitionSpec

from mdt_jax.types import Array

Axes: TypeAlias = tuple[str | None, ...]

# End of a parameter's path -> its axes, without the leading axis of stacked blocks.
# Parameters that match no row are replicated: mostly biases, 1/1000 of all numbers.
PARAMETER_AXES: Mapping[str, Axes] = {
  "patch_embed/bottleneck/kernel": (None, "width"),
  "patch_embed/linear/kernel": (None, "width"),
  "timestep_embed/fc1/kernel": (None, "width"),
  "timestep_embed/fc2/kernel": (None, "width"),
  "label_embed/table": (None, "width"),
  "vector_embed/fc1/kernel": (None, "width"),
  "vector_embed/fc2/kernel": (None, "width"),
  "tokens_embed/mlp/fc1/kernel": (None, "width"),
  "tokens_embed/mlp/fc2/kernel": (None, "width"),
  "tokens_embed/pool/kernel": (None, "width"),
  "pos_embed": (None, "width"),  # and decode_pos_embed
  "qkv/kernel": ("width", None, "heads", None),
  "qkv/bias": (None, "heads", None),
  "proj/kernel": ("heads", None, "width"),
  "relative_position_bias": (None, "heads"),
  "skip/kernel": (None, "width"),
  "fuse/kernel": (None, "width"),
  "modulation/linear/kernel": (None, "width"),
  "mixer_in/linear/kernel": (None, "width"),
  "mixer_out/linear/kernel": (None, "width"),
  "mixer_captions/linear/kernel": (None, "width"),
  "query/kernel": ("width", "heads", None),
  "query/bias": ("heads", None),
  "key_value/kernel": ("width", None, "heads", None),
  "key_value/bias": (None, "heads", None),
  "w1/kernel": ("width", "hidden"),
  "w2/kernel": ("width", "hidden"),
  "w3/kernel": ("hidden", "width"),
  "router/kernel": ("width", None),
  "expert_in": (None, "width", "hidden"),
  "expert_out": (None, "hidden", "width"),
  "fc1/kernel": ("width", "hidden"),
  "fc1/bias": ("hidden",),
  "fc2/kernel": ("hidden", "width"),
  "final_layer/linear/kernel": ("width", None),
  "decoder_layer/linear/kernel": ("width", None),
}


def parameter_axes(path: str) -> Axes:
  """Returns the axes of a parameter: the first row of PARAMETER_AXES that matches.

  Args:
    path: names joined by "/", such as "blocks/attention/qkv/kernel".

  Returns:
    Axis names, without the leading axis of stacked blocks; () if no row matches, which
    means a replicated parameter.
  """
  return next((axes for end, axes in PARAMETER_AXES.items() if path.endswith(end)), ())


def shard_batch(x: Array) -> Array:
  """Shards the first axis of x over the devices that share a batch."""
  return with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))


def gather(parameter: Array, axes: Sequence[str | None]) -> Array:
  """Gathers a parameter along "width", so that each device holds the whole axis."""
  return with_logical_constraint(
    parameter, tuple(None if axis == "width" else axis for axis in axes)
  )


def look_up(table: Array, index: Array) -> Array:
  """Returns table[index], for an index that has one entry, or one for each example.

  Inside the `shard_map` of `sharding.mean_over_data`, XLA would gather the index and
  the gradient of the result over all devices that share a batch. This function looks up
  and sums on each device alone; only gradients of the table are summed over devices.

  Args:
    table: (rows, …).
    index: (1 or B, …), integers.
  """
  axes = next(iter(logical_to_mesh_axes(("batch",)) or ()), None)
  mesh = jax.sharding.get_abstract_mesh()
  is_alone = len(index) == 1 or not isinstance(axes, str) or axes not in mesh.shape
  if is_alone or not mesh.manual_axes or len(index) % mesh.shape[axes]:
    return table[index]
  local = jax.shard_map(
    lambda table, index: table[index],
    in_specs=(PartitionSpec(), PartitionSpec(axes)),
    out_specs=PartitionSpec(axes),
    axis_names={axes},
    check_vma=False,
  )
  return local(table, index)


def on_each_device(
  function: Callable[..., Array],
  arguments: Sequence[Array | None],
  axes: Sequence[Axes],
) -> Array:
  """Calls a function with the parts of its arguments that a device holds.

  For functions that XLA cannot divide, such as the kernels of Pallas. Outside of
  `sharding.use_mesh`, and on one device, this is function(*arguments).

  Args:
    function: works on each part alone. Its result has the axes of the first argument.
    arguments: arrays, or None.
    axes: names of the axes of each argument, "batch", "heads" or None. An axis that the
      devices do not divide, such as the one of a bias that all images share, is whole
      on each of them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = set(mesh.axis_names) - set(mesh.manual_axes)
  if math.prod(mesh.shape[name] for name in free) == 1:
    return function(*arguments)

  def spec(argument: Array | None, axes: Axes) -> PartitionSpec:
    if argument is None:
      return PartitionSpec()
    places = logical_to_mesh_axes(axes) or ()
    sizes = zip(places, argument.shape, strict=False)
    return PartitionSpec(*(p if _divides(mesh, p, size) else None for p, size in sizes))

  specs = tuple(spec(a, names) for a, names in zip(arguments, axes, strict=True))
  local = jax.shard_map(
    function, in_specs=specs, out_specs=specs[0], axis_names=free, check_vma=False
  )
  return local(*arguments)


def _divides(mesh: AbstractMesh, axes: str | tuple[str, ...] | None, size: int) -> bool:
  """Whether axes of a mesh divide an axis of an array."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return size % math.prod(mesh.shape[name] for name in names) == 0


def gather_kernel(kernel: Array, axes: Sequence[str | None]) -> Array:
  """Same as `gather`, but the gradient is reduce-scattered in one operation.

  By default, XLA sums the whole gradient on each device and then slices it, which moves
  twice as many bytes.
  """
  if not nn.get_logical_axis_rules():
    return kernel
  return linear_call(
    lambda _, whole: gather(whole, axes),
    lambda _, gradient: with_logical_constraint(gradient, tuple(axes)),
    (),
    kernel,
  )
