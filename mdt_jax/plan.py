"""Plans a run: python -m mdt_jax.plan --config=mdt_b2 --topology=v5e:16x16

Compiles the training step (--what=sample: the sampler) for devices that this machine
does not have. Prints whether the step fits in their memory, which collectives it runs,
which kernels take longest, and an upper bound of its speed. TPU topologies need
libtpu, and GPUs the CUDA plugin: pip install -e '.[tpu]', or '.[cuda]', in a clone.
cpu:N needs no other package.
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

import dataclasses

from absl import flags

from mdt_jax import cli
from mdt_jax.atomic import write_json
from mdt_jax.chips import CHIPS, parse_topology
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.logs import logger
from mdt_jax.paths import output_file
from mdt_jax.planning.plan import WHATS, plan_run
from mdt_jax.planning.report import describe
from mdt_jax.settings import Settings

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Devices of the run: a TPU slice by its shape, such as v5e:16x16 or v4:4x4x4, or by "
  "its name, such as v5e-256; GPUs by their number, such as h100:8; or cpu:N for N CPU "
  "devices.",
  required=True,
)
SLICES = flags.DEFINE_integer(
  "slices", 1, "Number of TPU slices of this topology, joined by a slower network."
)
WHAT = flags.DEFINE_string("what", "train", "What to compile: train or sample.")
BATCH_PER_DEVICE = flags.DEFINE_integer(
  "batch_per_device",
  None,
  "Images on each device, at least 1. Default: config.batch_size over the devices.",
)
FIND_BATCH = flags.DEFINE_bool(
  "find_batch", False, "Search for the largest batch that fits in memory."
)
CHIP = flags.DEFINE_string(
  "chip",
  None,
  "With cpu:N: chip whose memory and speed the plan assumes, one of "
  f"{', '.join(CHIPS)}. Default: none.",
)
JSON = flags.DEFINE_string(
  "json", None, "Also write the plan to this file. Default: none."
)
cli.require(config="mdt_b2", topology="v5e:16x16")


def main(argv: list[str]) -> None:
  del argv
  topology = parse_topology(TOPOLOGY.value, SLICES.value)
  check_choice("what", WHAT.value, WHATS)
  if CHIP.value is not None:
    check_choice("chip", CHIP.value, CHIPS)
  if BATCH_PER_DEVICE.value is not None and BATCH_PER_DEVICE.value < 1:
    raise SettingError("batch_per_device", BATCH_PER_DEVICE.value, "must be at least 1")
  output = None if JSON.value is None else output_file("json", JSON.value)
  settings = Settings.from_config(cli.load_config(CONFIG))
  plan = plan_run(
    settings,
    topology,
    what=WHAT.value,
    chip=None if CHIP.value is None else CHIPS[CHIP.value],
    batch_per_device=BATCH_PER_DEVICE.value,
    find_batch=FIND_BATCH.value,
  )
  logger.info("%s", describe(plan))
  if output is not None:
    write_json(output, dataclasses.asdict(plan))


if __name__ == "__main__":
  cli.run(main)
