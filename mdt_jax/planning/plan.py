"""Compiles a run for other devices, and estimates memory, traffic and least time."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax import sharding
from mdt_jax.chips import CHIPS, Chip, Topology
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import check_eval
from mdt_jax.experiment import Experiment, build
from mdt_jax.logs import logger
from mdt_jax.planning.collectives import BETWEEN_SLICES, Traffic, collectives
from mdt_jax.planning.devices import compiler_options, open_devices
from mdt_jax.planning.kernels import Kernels, kernels
from mdt_jax.sampling.generator import make_generator
from mdt_jax.sampling.token_guidance import sampling_flops
from mdt_jax.settings import Settings
from mdt_jax.training.program import Program, make_program

WHATS = ("train", "sample")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}  # units in errors of the TPU compiler


@dataclasses.dataclass(frozen=True)
class Plan:
  """Memory, traffic and least time of a compiled program.

  Attributes:
    what: "train": a training step with the longest masked pass. "sample": sampling a
      batch of images.
    topology: name of the topology.
    slices: number of slices of this topology.
    mesh: name of the mesh axis -> number of devices.
    batch_size: number of images, over all devices.
    dtype: dtype of the matrix products.
    memory: bytes on each device, by use: "parameters", "optimizer", "ema", "other" (the
      batch and the like), "temporaries", "code" (the program), and their "total".
    limit: bytes of a device that a program can use; None if unknown.
    flops: model FLOPs over all devices, see `mdt_jax.models.flops`.
    collectives: kind of collective -> calls, and bytes that each device sends.
    kernels: kind of kernel -> calls, bytes, FLOPs and least time on a device; see
      `kernels.kernels`. Like `collectives` None if JAX cannot read the program.
    compile_seconds: time of the compilation on this machine.
    seconds: lower bounds of the run time from "products", "memory" and "network", each
      at the chip's published peak, without the network between slices; empty if the
      chip is unknown. Without "network" if JAX cannot read the program.
  """

  what: str
  topology: str
  slices: int
  mesh: dict[str, int]
  batch_size: int
  dtype: str
  memory: dict[str, int]
  limit: float | None
  flops: float
  collectives: dict[str, Traffic] | None
  kernels: dict[str, Kernels] | None
  compile_seconds: float
  seconds: dict[str, float]


class DoesNotFitError(Exception):
  """A program needs more memory than a device has.

  Args:
    needed: bytes that the program needs on each device.
    limit: bytes of a device that a program can use.
  """

  def __init__(self, needed: float, limit: float):
    self.needed = needed
    self.limit = limit
    super().__init__(
      f"needs {needed / 2**30:.2f} GiB of the {limit / 2**30:.2f} GiB of a device: "
      f"{(needed - limit) / 2**30:.2f} GiB too much"
    )


def plan_run(
  settings: Settings,
  topology: Topology,
  *,
  what: str = "train",
  chip: Chip | None = None,
  batch_per_device: int | None = None,
  find_batch: bool = False,
) -> Plan:
  """Compiles a run for a topology, and plans from the result; see `make_plan`.

  Call this before JAX starts its devices: the process then uses only the CPU. The
  memory of an autoencoder (`config.data.vae`) is not in the plan.

  Args:
    settings: settings of the run; `settings.batch_size` counts the images over all
      devices.
    topology, chip: see `make_plan`.
    what: "train" or "sample".
    batch_per_device: number of images on each device. None: `settings.batch_size` over
      the devices, or, with `find_batch`, a search that starts with 16.
    find_batch: whether to search for the largest batch that fits, to a precision of an
      eighth. Compiles the program once per batch size.

  Returns:
    The plan; with `find_batch`, the plan of the batch found.

  Raises:
    SettingError: a setting is invalid; the program does not fit into the memory, with
      `find_batch` not even with one image on each device; or `find_batch` lacks a chip
      whose memory is known.
  """
  if find_batch and chip is None and topology.kind not in CHIPS:
    raise SettingError("--find_batch", True, "needs the memory of a chip: give --chip")
  devices = open_devices(topology)

  def plan_with(batch: int | None) -> Plan:
    planned = settings
    if batch is not None:
      planned = dataclasses.replace(settings, batch_size=batch * len(devices))
    logger.info(
      "compiling for %s with batch size %d", topology.name, planned.batch_size
    )
    try:
      return make_plan(planned, topology, devices, what, chip)
    except SettingError as error:
      if batch is None or error.setting != "config.batch_size":
        raise
      raise SettingError("--batch_per_device", batch, f"gives {error}") from None

  if not find_batch:
    try:
      return plan_with(batch_per_device)
    except DoesNotFitError as error:
      given = ("--batch_per_device", batch_per_device)
      if batch_per_device is None:
        given = ("config.batch_size", settings.batch_size)
      raise SettingError(*given, str(error)) from None
  # Each part of a batch needs an image.
  parts = settings.accumulation_steps * settings.masking.groups
  start = max(1, (batch_per_device or 16) // parts)
  found = largest_batch(lambda images: plan_with(images * parts), start)
  if found is None:
    images = "one image" if parts == 1 else f"{parts} images"
    raise SettingError("--find_batch", True, f"{images} on each device do not fit")
  logger.info("largest batch: %d on each device", found[0] * parts)
  return found[1]


def make_plan(
  settings: Settings,
  topology: Topology,
  devices: list[Any],
  what: str = "train",
  chip: Chip | None = None,
) -> Plan:
  """Compiles the training step or the sampler of a run, and plans from the result.

  Args:
    settings: settings of the run; `settings.batch_size` is the number of images.
    topology: topology from `parse_topology`.
    devices: devices from `open_devices`.
    what: "train" or "sample".
    chip: chip for the memory limit and the speed; None for the chip of the topology.

  Raises:
    SettingError: a setting is invalid on these devices.
    DoesNotFitError: the program needs more memory than a device has.
  """
  experiment = build(settings, devices)
  check_eval(settings)
  chip = chip or CHIPS.get(topology.kind)
  mesh = experiment.mesh
  program = make_program(experiment)
  lower = _lower_step if what == "train" else _lower_sampler
  start = time.monotonic()
  with sharding.use_mesh(mesh):
    lowered = lower(experiment, program)
    try:
      compiled = lowered.compile(compiler_options(topology))
    except jax.errors.JaxRuntimeError as error:
      raise _does_not_fit(error, program) or error from None
  compile_seconds = time.monotonic() - start
  memory = _memory(compiled, program, what)
  limit = chip.memory if chip else None
  if limit and memory["total"] > limit:
    raise DoesNotFitError(memory["total"], limit)
  text = _read(compiled)
  found = None if text is None else collectives(text, len(devices), topology.slices)
  count = _count_flops(experiment, what)
  return Plan(
    what=what,
    topology=topology.name,
    slices=topology.slices,
    mesh=dict(mesh.shape),
    batch_size=settings.batch_size,
    dtype=settings.model.dtype,
    memory=memory,
    limit=limit,
    flops=count,
    collectives=found,
    kernels=None if text is None else kernels(text, chip),
    compile_seconds=compile_seconds,
    seconds=_least_seconds(chip, memory, count / len(devices), found) if chip else {},
  )


def largest_batch(
  plan_with: Callable[[int], Plan], start: int = 16
) -> tuple[int, Plan] | None:
  """Searches the largest batch that fits, by bisection, to a precision of an eighth.

  Args:
    plan_with: number of images on each device -> plan; raises DoesNotFitError.
    start: first number to try.

  Returns:
    (number of images on each device, plan); None if one image does not fit.
  """
  best: tuple[int, Plan] | None = None
  too_large, batch = None, start
  while batch >= 1 and batch != (best and best[0]):
    try:
      best = (batch, plan_with(batch))
    except DoesNotFitError:
      too_large = batch
    if best is None:
      batch = batch // 2
    elif too_large is None:
      batch = 2 * best[0]
    elif too_large - best[0] <= max(1, best[0] // 8):
      break
    else:
      batch = (best[0] + too_large) // 2
  return best


def _read(compiled: jax.stages.Compiled) -> str | None:
  """The text of a compiled program; None if JAX cannot read it.

  A TPU compiler may write operations that are newer than the JAX that reads them.
  """
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    logger.warning(
      "this JAX cannot read the program: its kernels, and what devices send, are "
      "unknown (%s)",
      str(error).splitlines()[0],
    )
    return None


def _lower_step(experiment: Experiment, program: Program) -> Any:
  """Lowers the training step whose static argument takes the most memory."""
  model, batch_size = experiment.model, experiment.settings.batch_size
  over_batch = sharding.over_batch(program.mesh)
  images: dict[str, tuple[tuple[int, ...], Any]]
  images = {"image": ((batch_size, *model.input_shape), jnp.float32)}
  if not experiment.holds_pixels:
    images = {"moments": ((batch_size, 2, *model.input_shape), jnp.float16)}
  condition = model.conditioning
  arrays = {
    name: ((batch_size, *shape), jnp.float32)
    for name, shape in {**condition.arrays(), **condition.optional_arrays()}.items()
  }
  shapes = {"label": ((batch_size,), jnp.int32), **images, **arrays}
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=over_batch)
    for name, (shape, dtype) in shapes.items()
  }
  step: Any = program.step  # jitted
  return step.lower(program.state, batch, experiment.objective.largest_static)


def _lower_sampler(experiment: Experiment, program: Program) -> Any:
  """Lowers the sampler."""
  over_batch = sharding.over_batch(program.mesh)
  batch_size = experiment.settings.batch_size
  y = jax.eval_shape(lambda: experiment.model.conditioning.dummy(batch_size))
  labels, ids = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=over_batch)
    for shape, dtype in ((y.shape, y.dtype), ((batch_size,), jnp.uint32))
  )
  seed = jax.ShapeDtypeStruct(
    (), jnp.uint32, sharding=sharding.replicated(program.mesh)
  )
  platform = program.mesh.devices.flat[0].platform
  generator: Any = make_generator(
    experiment.model, experiment.sampler, platform=platform
  )
  return generator.lower(program.state.params, labels, ids, seed, {})


def _does_not_fit(error: Exception, program: Program) -> DoesNotFitError | None:
  """Converts an out-of-memory error of the TPU compiler; None for other errors."""
  number = r"([\d.]+)([KMG])"
  if found := re.search(rf"Used {number} of {number} hbm", str(error)):
    at_rest = 0
  elif found := re.search(
    rf"temporaries \({number}\) exceeds available HBM \({number}\)", str(error)
  ):
    at_rest = _bytes_of(program.state)
  else:
    return None
  needed, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
  return DoesNotFitError(needed + at_rest, limit)


def _memory(compiled: Any, program: Program, what: str) -> dict[str, int]:
  """Bytes on each device by use, see `Plan.memory`."""
  found = compiled.memory_analysis()
  state = program.state
  parts = {"parameters": _bytes_of(state.params)}
  if what == "train":
    parts["optimizer"] = _bytes_of(state.opt_state)
    parts["ema"] = _bytes_of(state.ema)
  # A donated argument and its result share memory, and count once.
  at_rest = found.argument_size_in_bytes + found.output_size_in_bytes
  at_rest -= found.alias_size_in_bytes
  parts["other"] = max(0, at_rest - sum(parts.values()))
  parts["temporaries"] = found.temp_size_in_bytes
  parts["code"] = found.generated_code_size_in_bytes
  return {**parts, "total": sum(parts.values())}


def _bytes_of(tree: Any) -> int:
  """Bytes of sharded arrays on each device."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _count_flops(experiment: Experiment, what: str) -> float:
  """Model FLOPs of a training step or of sampling, over the whole batch."""
  batch_size = experiment.settings.batch_size
  if what == "sample":
    return batch_size * sampling_flops(experiment.model, experiment.sampler)
  objective = experiment.objective
  return batch_size * objective.flops(objective.largest_static)


def _least_seconds(
  chip: Chip,
  memory: dict[str, int],
  flops_a_device: float,
  traffic: dict[str, Traffic] | None,
) -> dict[str, float]:
  """Lower bounds of the run time, see `Plan.seconds`."""
  state = sum(memory.get(part, 0) for part in ("parameters", "optimizer", "ema"))
  least = {
    "products": flops_a_device / chip.flops,
    # The program reads and writes the state and the temporaries at least once.
    "memory": 2 * (state + memory["temporaries"]) / chip.bandwidth,
  }
  if traffic is not None:
    inside = (kind for kind in traffic if not kind.endswith(BETWEEN_SLICES))
    least["network"] = sum(traffic[kind].sent for kind in inside) / chip.network
  return least
