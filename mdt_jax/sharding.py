"""Sharding of arrays over a device mesh with axes data, fsdp and tensor.

A batch is sharded over data and fsdp. Parameters, their averages and the optimizer's
state are sharded over fsdp (along the width of the network) and over tensor (along
heads or hidden units of the MLP), and are replicated over data. `models.partitioning`
names the axes of parameters; RULES maps these names to axes of the mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdt_jax.errors import SettingError
from mdt_jax.models.network import Network
from mdt_jax.models.partitioning import parameter_axes
from mdt_jax.types import Params

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES = (
  ("batch", BATCH_AXES),
  ("width", "fsdp"),
  ("heads", "tensor"),
  ("hidden", "tensor"),
)
# Inside a part of the axis data, see `mean_over_data`.
RULES_OF_ONE_PART = (("batch", "fsdp"), *RULES[1:])


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
  *,
  slices: int = -1,
) -> Mesh:
  """Builds a device mesh that keeps neighbours on a TPU's torus adjacent.

  One size may be -1, which means the number of remaining devices. Devices of several
  slices are joined along the axis data: fsdp and tensor stay inside a slice.

  Args:
    data: size of the axis data: the batch is sharded, parameters are replicated.
    fsdp: size of the axis fsdp: the batch and the parameters are sharded.
    tensor: size of the axis tensor: heads and hidden units are sharded.
    devices: the devices; None for all devices of all processes.
    slices: see `count_slices`.

  Raises:
    SettingError: a size is invalid, the product of the sizes is not the number of
      devices, or the slices do not fit.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape((data, fsdp, tensor), len(devices))
  slices = count_slices(slices, shape[0], devices)
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]),
      (slices, 1, 1),
      devices,
      process_is_granule=len(_slices_of(devices)) == 1,
      allow_split_physical_axes=True,
    )
  return Mesh(grid, AXES)


def count_slices(slices: int, data: int, devices: Sequence[Any]) -> int:
  """Returns the number of slices that the axis data of a mesh crosses.

  Args:
    slices: `config.mesh.slices`. -1: what the devices report. 1: slices do not matter.
      Another number: that of the devices or, if these report one slice, that of their
      processes.
    data: size of the axis data.
    devices: devices of the mesh.

  Raises:
    SettingError: the devices have another number of slices, or the slices do not divide
      the axis data.
  """
  reported = len(_slices_of(devices))
  processes = len({device.process_index for device in devices})
  if slices < 1 and slices != -1:
    raise SettingError("config.mesh.slices", slices, "must be -1 or at least 1")
  if slices not in (-1, 1, reported) and (reported > 1 or slices != processes):
    raise SettingError(
      "config.mesh.slices",
      slices,
      f"does not fit the devices, which are in {reported} slices and {processes} "
      "processes",
    )
  found = reported if slices == -1 else slices
  if data % found:
    raise SettingError(
      "config.mesh.slices",
      slices,
      f"the {found} slices must divide config.mesh.data = {data}; "
      "config.mesh.slices = 1 sends weights between slices",
    )
  return found


def _slices_of(devices: Sequence[Any]) -> set[int]:
  """Returns the indices of the slices of devices; CPUs report none."""
  return {getattr(device, "slice_index", None) or 0 for device in devices}


def mesh_shape(sizes: Sequence[int], num_devices: int) -> tuple[int, ...]:
  """Replaces a size of -1 by the number of remaining devices.

  Args:
    sizes: sizes of data, fsdp and tensor; at most one may be -1.
    num_devices: number of devices.

  Returns:
    Sizes whose product is num_devices.

  Raises:
    SettingError: a size is below 1 and not -1, two sizes are -1, or the product is not
      num_devices.
  """
  for axis, size in zip(AXES, sizes, strict=True):
    if size < 1 and size != -1:
      raise SettingError(f"config.mesh.{axis}", size, "must be -1 or at least 1")
  sizes = tuple(sizes)
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1:
    raise SettingError("config.mesh", sizes, "at most one axis may be -1")
  shape = tuple(num_devices // known if size == -1 else size for size in sizes)
  if int(np.prod(shape)) != num_devices:
    raise SettingError(
      "config.mesh",
      " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True)),
      f"the product must be the number of devices, {num_devices}",
    )
  return shape


def check_mesh(
  sizes: Sequence[int],
  devices: Sequence[Any],
  slices: int,
  model: Network,
  *,
  batch_size: int,
  accumulation_steps: int,
  groups: int = 1,
) -> None:
  """Checks that a batch and a network can be sharded over a mesh.

  Args:
    sizes: sizes of data, fsdp and tensor, see `mesh_shape`.
    devices: devices of the run.
    slices: see `count_slices`.
    model: the network.
    batch_size: number of images per step, over all devices.
    accumulation_steps: number of parts that a batch is split into.
    groups: number of groups that each part is split into; see `Objective.groups`.

  Raises:
    SettingError: the mesh does not fit the devices, or an axis does not divide the
      batch size, the width, the heads or the hidden units.
  """
  data, fsdp, tensor = mesh_shape(sizes, len(devices))
  count_slices(slices, data, devices)
  parts = data * fsdp * accumulation_steps * groups
  if batch_size % parts:
    by_groups = f" x config.masking.groups = {groups}" if groups > 1 else ""
    raise SettingError(
      "config.batch_size",
      batch_size,
      f"must be divisible by {parts} = {data * fsdp} devices (mesh axes data x fsdp) x "
      f"config.accumulation_steps = {accumulation_steps}{by_groups}",
    )
  width = getattr(model, "hidden_size", fsdp)
  if width % fsdp:
    raise SettingError("config.mesh.fsdp", fsdp, f"must divide hidden_size = {width}")
  for name in ("patch_bottleneck", "decoder_hidden_size", "mixer_hidden_size"):
    other = getattr(model, name, None) or 0
    if other % fsdp:
      raise SettingError("config.mesh.fsdp", fsdp, f"must divide {name} = {other}")
  ratio = getattr(model, "mlp_ratio", tensor)
  inner = getattr(model, "decoder_hidden_size", tensor)
  mixer = getattr(model, "mixer_width", tensor)
  for heads, hidden, what in (
    (getattr(model, "num_heads", tensor), int(width * ratio), "MLP"),
    (getattr(model, "decoder_num_heads", tensor), int(inner * ratio), "decoder's MLP"),
    (getattr(model, "mixer_heads", tensor), int(mixer * ratio), "mixer's MLP"),
  ):
    if heads % tensor or hidden % tensor:
      raise SettingError(
        "config.mesh.tensor",
        tensor,
        f"must divide the {heads} heads and the {hidden} hidden units of the {what}",
      )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """Context in which traced networks shard their activations over `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def mean_over_data(
  compute: Callable[[Params, Any], tuple[Params, Any]], mesh: Mesh
) -> Callable[[Params, Any], tuple[Params, Any]]:
  """Makes each part of the axis data compute gradients alone, and averages these.

  On a mesh with both data and fsdp, XLA sums whole gradients over all devices and then
  cuts out the parts that a device stores. Here, the devices of an axis fsdp sum
  gradients into parts (reduce-scatter), and only parts are summed over data. Across
  slices of TPUs, only these parts go over the slow network.

  Args:
    compute: (parameters, batch) -> (gradients of a mean over the batch, values for each
      example). The arrays of the batch and the values have B as their first axis.
    mesh: the mesh of the run.

  Returns:
    A function with the arguments and results of `compute`; `compute` itself if the mesh
    has one of both axes.
  """
  if mesh.shape["data"] == 1 or mesh.shape["fsdp"] == 1:
    return compute

  def of_one_part(params: Params, batch: Any) -> tuple[Params, Any]:
    with nn.logical_axis_rules(RULES_OF_ONE_PART):
      gradients, values = compute(params, batch)
    return jax.lax.pmean(gradients, "data"), values

  return jax.shard_map(
    of_one_part,
    mesh=mesh,
    in_specs=(PartitionSpec(), PartitionSpec("data")),
    out_specs=(PartitionSpec(), PartitionSpec("data")),
    axis_names={"data"},
    check_vma=False,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that copies an array to each device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """Returns the number of parts that a batch is sharded into: data x fsdp."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def of_state(mesh: Mesh, state: Any) -> Any:
  """Returns the sharding of each array in a training state or in parameters.

  Args:
    mesh: output of `make_mesh`.
    state: tree of arrays, or of their shapes and dtypes. Arrays are recognised by the
      end of their path, so that averages and optimizer moments are sharded like their
      parameters. All other arrays are replicated.

  Returns:
    A tree of NamedSharding with the structure of `state`.
  """

  def name_of(path: Any) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")

  parameters = jax.tree_util.tree_leaves_with_path(getattr(state, "params", state))
  shapes = {name_of(path): leaf.shape for path, leaf in parameters}

  def of_leaf(path: Any, leaf: Any) -> NamedSharding:
    name = name_of(path)
    # Some optimizers, such as adafactor, have statistics of another shape than the
    # parameter; these are replicated.
    shape = next((s for end, s in shapes.items() if name.endswith(end)), leaf.shape)
    axes = parameter_axes(name) if leaf.shape == shape else ()
    stacked = (None,) * (len(leaf.shape) - len(axes))
    spec = spmd.logical_to_mesh_axes((*stacked, *axes), RULES)
    return NamedSharding(mesh, spec or PartitionSpec())

  return jax.tree_util.tree_map_with_path(of_leaf, state)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Returns the rows of a global batch that the devices of this process need, sorted.

  Processes along the same tensor axis need the same rows.

  Args:
    mesh: the mesh of the run.
    batch_size: number of rows of the global batch.
  """
  places = over_batch(mesh).addressable_devices_indices_map((batch_size,))
  parts = [index[0] for index in places.values() if index is not None]
  rows = {row for part in parts for row in range(*part.indices(batch_size))}
  return sorted(rows)


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
  """Builds global arrays, sharded by `over_batch`, from the rows of each process.

  Args:
    batch: name -> array with the rows `local_rows(mesh, batch_size)` of the batch.
    mesh: the mesh of the run.
    batch_size: number of rows of the global batch.
  """
  return {
    name: jax.make_array_from_process_local_data(
      over_batch(mesh), array, (batch_size, *array.shape[1:])
    )
    for name, array in batch.items()
  }


def fetch(array: jax.Array) -> np.ndarray:
  """Copies a whole array to this host.

  If processes hold different parts, all of these processes must call this function.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)
