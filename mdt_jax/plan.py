"""Plans a run: python -m mdt_jax.plan --config=configs/mdt_b2.py --topology=v5e:16x16

Compiles the training step (--what=sample: the sampler) for devices that are not there,
and says whether it fits, what it sends, and how fast it may be at best. TPU topologies
need pip install -e '.[tpu]'; cpu:8 needs nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from mdt_jax import cli
from mdt_jax.atomic import write_json
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.logs import logger
from mdt_jax.planning.chips import CHIPS, parse_topology
from mdt_jax.planning.plan import WHATS, plan_run
from mdt_jax.planning.report import describe
from mdt_jax.settings import Settings

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config().", lock_config=True
)
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:16x16, v4:4x4x4, v5e-256 or the like; cpu:8.", required=True
)
WHAT = flags.DEFINE_string("what", "train", "train or sample.")
BATCH_PER_DEVICE = flags.DEFINE_integer(
  "batch_per_device", None, "Images; by config.batch_size unless given."
)
FIND_BATCH = flags.DEFINE_bool("find_batch", False, "Search the largest one that fits.")
CHIP = flags.DEFINE_string("chip", None, "With cpu:N: whose memory and speed count.")
JSON = flags.DEFINE_string("json", None, "File that the plan is written to as well.")
flags.mark_flag_as_required("config")


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
  if JSON.value:
    write_json(Path(JSON.value), dataclasses.asdict(plan))


if __name__ == "__main__":
  cli.run(main)
