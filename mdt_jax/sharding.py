"""How arrays lie on the devices of a mesh with axes data, fsdp and tensor.

A batch is sharded over data x fsdp. Parameters, their averages and the optimizer's
moments are sharded over fsdp by their width, and over tensor by their heads or by the
hidden units of the MLP; data holds copies. `models.partitioning` names the axes;
`RULES` say which axis of the mesh each name means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
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

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

RULES = (
  ("batch", BATCH_AXES),
  ("width", "fsdp"),
  ("heads", "tensor"),
  ("hidden", "tensor"),
)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A mesh of devices; neighbours on a TPU's torus are neighbours on it.

  Args:
    data: devices that share a batch and each hold copies; -1 for what is left.
    fsdp: devices that share a batch and the state.
    tensor: devices that share heads and hidden units, for the same images.
    devices: all of all processes unless given.

  Raises:
    SettingError: the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape((data, fsdp, tensor), len(devices))
  return Mesh(
    mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES
  )


def mesh_shape(sizes: Sequence[int], num_devices: int) -> tuple[int, ...]:
  """Sizes of the axes, with -1 replaced by the rest of the devices.

  Args:
    sizes: of data, fsdp and tensor; one of them may be -1.
    num_devices: product of the sizes.

  Raises:
    SettingError: another size below 1, or another product.
  """
  for axis, size in zip(AXES, sizes, strict=True):
    if size < 1 and size != -1:
      raise SettingError(f"config.mesh.{axis}", size, "must be -1 or at least 1")
  sizes = tuple(sizes)
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1:
    raise SettingError("config.mesh", sizes, "one axis at most may be -1")
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
  num_devices: int,
  model: Network,
  *,
  batch_size: int,
  accumulation_steps: int,
) -> None:
  """Raises SettingError where devices cannot share a batch or a network.

  Args:
    sizes: of data, fsdp and tensor, see `mesh_shape`.
    num_devices: of the run.
    model: the network.
    batch_size: images a step, over all devices.
    accumulation_steps: parts that a batch is split into.
  """
  data, fsdp, tensor = mesh_shape(sizes, num_devices)
  parts = data * fsdp * accumulation_steps
  if batch_size % parts:
    raise SettingError(
      "config.batch_size",
      batch_size,
      f"must be divisible by {data * fsdp} devices that share a batch x "
      f"config.accumulation_steps = {accumulation_steps}, so by {parts}",
    )
  width = getattr(model, "hidden_size", fsdp)
  if width % fsdp:
    raise SettingError("config.mesh.fsdp", fsdp, f"must divide the width of {width}")
  heads = getattr(model, "num_heads", tensor)
  hidden = int(width * getattr(model, "mlp_ratio", tensor))
  if heads % tensor or hidden % tensor:
    raise SettingError(
      "config.mesh.tensor",
      tensor,
      f"must divide the {heads} heads and the {hidden} hidden units",
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """Inside, a network that is traced shards its activations over `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on each device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The first axis sharded over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
  """Parts that a batch is sharded into."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def of_state(mesh: Mesh, state: Any) -> Any:
  """How each array of a state, of parameters or of a part of them lies on `mesh`.

  Args:
    mesh: of `make_mesh`.
    state: tree of arrays or of their shapes; parameters are found by the end of
      their path, so also in averages and in the moments of an optimizer.

  Returns:
    A tree of NamedSharding.
  """

  def name_of(path: Any) -> str:
    return "/" + jax.tree_util.keystr(path, simple=True, separator="/")

  parameters = jax.tree_util.tree_leaves_with_path(getattr(state, "params", state))
  shapes = {name_of(path): leaf.shape for path, leaf in parameters}

  def of_leaf(path: Any, leaf: Any) -> NamedSharding:
    name = name_of(path)
    # Some optimizers, such as adafactor, keep statistics of other shapes.
    shape = next((s for end, s in shapes.items() if name.endswith(end)), leaf.shape)
    axes = parameter_axes(name) if leaf.shape == shape else ()
    stacked = (None,) * (len(leaf.shape) - len(axes))
    spec = spmd.logical_to_mesh_axes((*stacked, *axes), RULES)
    return NamedSharding(mesh, spec or PartitionSpec())

  return jax.tree_util.tree_map_with_path(of_leaf, state)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """Rows of a global batch that this process's devices need, increasing.

  Several processes may need the same rows: those that a tensor axis spans.
  """
  places = over_batch(mesh).addressable_devices_indices_map((batch_size,))
  parts = [index[0] for index in places.values() if index is not None]
  rows = {row for part in parts for row in range(*part.indices(batch_size))}
  return sorted(rows)


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
  """Rows `local_rows` of a batch, as this process's parts of global arrays."""
  return {
    name: jax.make_array_from_process_local_data(
      over_batch(mesh), array, (batch_size, *array.shape[1:])
    )
    for name, array in batch.items()
  }


def fetch(array: jax.Array) -> np.ndarray:
  """The whole of an array on this host; each process that holds a part has to call."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)
