"""Trains from a config: python -m mdt_jax.main --config=configs/digits.py --workdir=DIR

A rerun of the same command goes on from the last checkpoint. Any setting is
overridden on the command line: --config.batch_size=64.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from mdt_jax import cli
from mdt_jax.checkpoints.retries import SaveError
from mdt_jax.logs import logger
from mdt_jax.training import distributed, loop, replay
from mdt_jax.training.preemption import Interrupted

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config().", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder for checkpoints, TensorBoard events and pictures.",
  required=True,
)
REPLAY_STEP = flags.DEFINE_integer(
  "replay_step",
  None,
  "Train nothing; look into this step, counted from 0, once more: which examples, "
  "parameters and gradients are not finite. Writes WORKDIR/replay_STEP.json.",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  del argv
  cache_dir = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if cache_dir is None:
    # The next start of this run compiles nothing.
    cache = Path(WORKDIR.value).expanduser().absolute() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if REPLAY_STEP.value is not None:
    replay.replay(cli.load_config(CONFIG), WORKDIR.value, REPLAY_STEP.value)
    return
  try:
    loop.train(cli.load_config(CONFIG), WORKDIR.value)
  except SaveError as error:
    sys.exit(f"error: {error}")
  except Interrupted as stop:
    logger.info("%s; the same command goes on from there", stop)
    # Launchers restart a run that was preempted, but not one that was interrupted.
    by_hand = signal.SIGINT in stop.signals
    sys.exit(cli.EXIT_INTERRUPTED if by_hand else distributed.EXIT_TRY_AGAIN)


if __name__ == "__main__":
  cli.run(main)
