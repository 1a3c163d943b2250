"""Compiles a run for devices that are not there, and says what it will take."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories, sharding
from mdt_jax.errors import SettingError
from mdt_jax.models import flops
from mdt_jax.planning import hlo
from mdt_jax.planning.chips import CHIPS, Chip, Topology
from mdt_jax.sampling.batches import make_generator
from mdt_jax.training.program import Program, make_program

WHATS = ("train", "sample")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a program takes of each device, and the least time that it can take.

  Attributes:
    what: "train", a step of the longest masked pass; "sample", a batch of images.
    topology: the devices.
    mesh: axis -> devices along it.
    batch_size: images over all devices.
    dtype: of the matrix products.
    memory: bytes of each device: parameters, optimizer, ema, the batch and the like
      (other), what is made on the way (temporaries), the program itself (code), and
      their total.
    limit: bytes that a program may take; None where that is not known.
    flops: model FLOPs of the whole program, see `mdt_jax.models.flops`.
    collectives: kind -> how many, and bytes that each device sends.
    compile_seconds: on this machine.
    seconds: least time for the products, for the memory and for the network, each at
      the chip's published best; empty without a chip.
  """

  what: str
  topology: str
  mesh: dict[str, int]
  batch_size: int
  dtype: str
  memory: dict[str, int]
  limit: float | None
  flops: float
  collectives: dict[str, hlo.Traffic]
  compile_seconds: float
  seconds: dict[str, float]


class DoesNotFitError(Exception):
  """A program needs more memory than a device has.

  Args:
    needed: bytes.
    limit: bytes that a device has.
  """

  def __init__(self, needed: float, limit: float):
    self.needed = needed
    self.limit = limit
    super().__init__(
      f"needs {needed / 2**30:.2f} GiB of the {limit / 2**30:.2f} GiB of a device: "
      f"{(needed - limit) / 2**30:.2f} GiB too much"
    )


def open_devices(topology: Topology) -> list[Any]:
  """Devices to compile for; programs for TPUs can be compiled, and not run.

  Raises:
    SettingError: the compiler is not installed, or refuses the shape.
  """
  if topology.kind == "cpu":
    if jax.device_count() < topology.num_devices:
      raise SettingError(
        "--topology",
        topology.name,
        f"this process simulates {jax.device_count()} devices: JAX was started before",
      )
    return jax.devices()[: topology.num_devices]
  # Otherwise libtpu asks the network which TPU it runs on, and warns.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is taken
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  # Both cores of a v4 chip are one device, as JAX has them on a real one.
  options = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
  try:
    found = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    return list(found.devices)
  except RuntimeError as error:
    reason = str(error).strip().splitlines()[0]
    raise SettingError(
      "--topology",
      topology.name,
      f"cannot be compiled for: {reason}; the compiler comes with "
      "pip install -e '.[tpu]'",
    ) from None


def make_plan(
  config: ConfigDict,
  topology: Topology,
  devices: list[Any],
  what: str = "train",
  chip: Chip | None = None,
) -> Plan:
  """Compiles the training step, or the sampler, of a run.

  Args:
    config: of the run; config.batch_size images are trained or sampled at a time.
    topology: of `parse_topology`.
    devices: of `open_devices`.
    what: "train" or "sample".
    chip: whose memory and speed count; the topology's own unless given.

  Raises:
    SettingError: a setting that cannot be used on these devices.
    DoesNotFitError: a device has too little memory.
  """
  settings.check(config, len(devices))
  chip = chip or CHIPS.get(topology.kind)
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  program = make_program(config, mesh)
  lower = _lower_step if what == "train" else _lower_sampler
  start = time.monotonic()
  with sharding.use_mesh(mesh):
    lowered = lower(config, program)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      raise _does_not_fit(error, program) or error from None
  compile_seconds = time.monotonic() - start
  memory = _memory(compiled, program, what)
  limit = chip.memory if chip else None
  if limit and memory["total"] > limit:
    raise DoesNotFitError(memory["total"], limit)
  found = hlo.collectives(compiled.as_text(), len(devices))
  count = _count_flops(config, what)
  return Plan(
    what=what,
    topology=topology.name,
    mesh=dict(mesh.shape),
    batch_size=config.batch_size,
    dtype=config.model.dtype,
    memory=memory,
    limit=limit,
    flops=count,
    collectives=found,
    compile_seconds=compile_seconds,
    seconds=_least_seconds(chip, memory, count / len(devices), found) if chip else {},
  )


def largest_batch(
  plan_with: Callable[[int], Plan], start: int = 16
) -> tuple[int, Plan] | None:
  """The largest batch a device that fits, to an eighth, by bisection.

  Args:
    plan_with: batch a device -> its plan; raises DoesNotFitError.
    start: the first to try.

  Returns:
    Batch and plan; None where not even 1 fits.
  """
  best: tuple[int, Plan] | None = None
  too_large, batch = None, start
  while batch >= 1 and batch != (best and best[0]):
    try:
      best = (batch, plan_with(batch))
    except DoesNotFitError:
      too_large = batch
    if best is None:
      batch = too_large // 2
    elif too_large is None:
      batch = 2 * best[0]
    elif too_large - best[0] <= max(1, best[0] // 8):
      break
    else:
      batch = (best[0] + too_large) // 2
  return best


def _lower_step(config: ConfigDict, program: Program) -> Any:
  model = factories.make_model(config)
  size = (model.input_size, model.input_size, model.in_channels)
  spread = sharding.over_batch(program.mesh)
  images = {"image": ((config.batch_size, *size), jnp.float32)}
  if not factories.holds_pixels(config):
    images = {"moments": ((config.batch_size, 2, *size), jnp.float16)}
  shapes = {"label": ((config.batch_size,), jnp.int32), **images}
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=spread)
    for name, (shape, dtype) in shapes.items()
  }
  lengths = factories.kept_lengths(config)
  return program.step.lower(program.state, batch, lengths and lengths.lengths[-1])


def _lower_sampler(config: ConfigDict, program: Program) -> Any:
  spread = sharding.over_batch(program.mesh)
  labels, ids = (
    jax.ShapeDtypeStruct((config.batch_size,), dtype, sharding=spread)
    for dtype in (jnp.int32, jnp.uint32)
  )
  seed = jax.ShapeDtypeStruct(
    (), jnp.uint32, sharding=sharding.replicated(program.mesh)
  )
  platform = program.mesh.devices.flat[0].platform
  generator = make_generator(config, platform=platform)
  return generator.lower(program.state.params, labels, ids, seed, {})


def _does_not_fit(error: Exception, program: Program) -> DoesNotFitError | None:
  """What the TPU compiler says in words: all that a program needs, or on its way."""
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
  found = compiled.memory_analysis()
  state = program.state
  parts = {"parameters": _bytes_of(state.params)}
  if what == "train":
    parts["optimizer"] = _bytes_of(state.opt_state)
    parts["ema"] = _bytes_of(state.ema)
  # Results that take the place of arguments are there once.
  at_rest = found.argument_size_in_bytes + found.output_size_in_bytes
  at_rest -= found.alias_size_in_bytes
  parts["other"] = max(0, at_rest - sum(parts.values()))
  parts["temporaries"] = found.temp_size_in_bytes
  parts["code"] = found.generated_code_size_in_bytes
  return {**parts, "total": sum(parts.values())}


def _bytes_of(tree: Any) -> int:
  """Bytes of arrays on each device."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _count_flops(config: ConfigDict, what: str) -> float:
  model = factories.make_model(config)
  if what == "sample":
    passes = 1 if config.sampling.cfg_scale == 1 else 2
    steps = passes * config.sampling.num_steps
    return config.batch_size * steps * flops.forward_flops(model)
  lengths = factories.kept_lengths(config)
  longest = lengths.lengths[-1] if lengths else None
  return config.batch_size * flops.train_flops(model, longest)


def _least_seconds(
  chip: Chip,
  memory: dict[str, int],
  flops_a_device: float,
  collectives: dict[str, hlo.Traffic],
) -> dict[str, float]:
  """A floor by products, by memory and by network, were each at its best alone."""
  state = sum(memory.get(part, 0) for part in ("parameters", "optimizer", "ema"))
  sent = sum(traffic.sent for traffic in collectives.values())
  return {
    "products": flops_a_device / chip.flops,
    # All of the state is read and written, and all that is made on the way.
    "memory": 2 * (state + memory["temporaries"]) / chip.bandwidth,
    "network": sent / chip.network,
  }
