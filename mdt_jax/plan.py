"""Plans a run: python -m mdt_jax.plan --config=configs/mdt_b2.py --topology=v5e:16x16

Compiles the training step (--what=sample: the sampler) for devices that are not there,
and says whether it fits, what it sends, and how fast it may be at best. TPU topologies
need pip install -e '.[tpu]'; cpu:8 needs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from mdt_jax import cli
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.planning.chips import CHIPS, parse_topology
from mdt_jax.planning.plan import (
  WHATS,
  DoesNotFitError,
  Plan,
  largest_batch,
  make_plan,
  open_devices,
)

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config().", lock_config=True
)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:16x16, v4:4x4x4, v5e-256 or the like; cpu:8."
)
WHAT = flags.DEFINE_string("what", "train", "train or sample.")
BATCH_PER_DEVICE = flags.DEFINE_integer(
  "batch_per_device", None, "Images; by config.batch_size unless given."
)
FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Search the largest one that fits.")
CHIP = flags.DEFINE_string("chip", None, "With cpu:N: whose memory and speed count.")
JSON = flags.DEFINE_string("json", None, "File that the plan is written to as well.")
flags.mark_flags_as_required(["config", "topology"])

logger = logging.getLogger("mdt_jax")


def main(argv: list[str]) -> None:
  del argv
  topology = parse_topology(TOPOLOGY.value)
  check_choice("--what", WHAT.value, WHATS)
  if CHIP.value is not None:
    check_choice("--chip", CHIP.value, CHIPS)
  if BATCH_PER_DEVICE.value is not None and BATCH_PER_DEVICE.value < 1:
    raise SettingError(
      "--batch_per_device", BATCH_PER_DEVICE.value, "must be at least 1"
    )
  config = cli.load_config(CONFIG)
  # Nothing is computed: a TPU or GPU of this machine stays free.
  jax.config.update("jax_platforms", "cpu")
  if topology.kind == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.num_devices)
  devices = open_devices(topology)

  def plan_with(batch: int | None) -> Plan:
    planned = config.copy_and_resolve_references()
    if batch is not None:
      planned.batch_size = batch * len(devices)
    logger.info("compiling %d images for %s", planned.batch_size, topology.name)
    return make_plan(planned, topology, devices, WHAT.value, CHIPS.get(CHIP.value))

  try:
    plan = plan_with(BATCH_PER_DEVICE.value) if not FIND_BATCH.value else None
  except DoesNotFitError as error:
    raise SettingError(
      "--batch_per_device", BATCH_PER_DEVICE.value, str(error)
    ) from None
  if FIND_BATCH.value:
    found = largest_batch(plan_with, BATCH_PER_DEVICE.value or 16)
    if found is None:
      raise SettingError("--find_batch", True, "not even one image a device fits")
    logger.info("largest batch a device: %d", found[0])
    plan = found[1]
  logger.info("%s", describe(plan))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(dataclasses.asdict(plan), indent=2) + "\n")


def describe(plan: Plan) -> str:
  """The plan in some lines."""
  gib = 2**30
  devices = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"{plan.what} on {plan.topology} ({devices}), {plan.batch_size} images, "
    f"{plan.dtype}",
    f"compiled in {plan.compile_seconds:.0f} s",
    "memory of a device, GiB: "
    + ", ".join(f"{name} {size / gib:.2f}" for name, size in plan.memory.items()),
  ]
  if plan.limit:
    spare = plan.limit - plan.memory["total"]
    lines.append(f"fits: {spare / gib:.2f} of {plan.limit / gib:.2f} GiB to spare")
  lines.append(f"model FLOPs: {plan.flops:.3g}")
  lines += [
    f"{kind}: {traffic.calls} calls, each device sends {traffic.sent / 1e6:.1f} MB"
    for kind, traffic in sorted(plan.collectives.items())
  ] or ["nothing is sent between devices"]
  if plan.seconds:
    least = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.seconds.items())
    bound = max(plan.seconds.values())
    lines.append(
      f"at least, ms: {least}; so at best {plan.batch_size / bound:.0f} images/s, "
      f"{plan.seconds['products'] / bound:.0%} of the chip's products"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run(main)
