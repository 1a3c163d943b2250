"""Trains a network: python -m mdt_jax.main --config=digits --workdir=runs/digits

The same command resumes a stopped run from its last checkpoint. --config.NAME=VALUE
changes a setting, for example --config.batch_size=64.

Exit codes: 0 the run is finished, 2 a flag or a setting cannot be used, 75 stopped by a
signal, a process was lost or the data cannot be read now (repeat the command), 130
interrupted by Ctrl-C, 1 other errors.
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

import signal
import sys

import jax
from absl import flags

from mdt_jax import cli
from mdt_jax.checkpoints.retries import SaveError
from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from mdt_jax.logs import logger
from mdt_jax.paths import absolute, any_path
from mdt_jax.training import loop, replay
from mdt_jax.training.preemption import Interrupted

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run. It receives checkpoints, metrics and pictures. A folder with "
  "checkpoints resumes their run.",
  required=True,
)
REPLAY_STEP = flags.DEFINE_integer(
  "replay_step",
  None,
  "Do not train, but repeat this step of a run, counted from 0, and report which "
  "examples, parameters and gradients are not finite. Writes "
  "WORKDIR/replay_STEP.json. Default: train.",
)
cli.require(config="digits", workdir="runs/digits")


def main(argv: list[str]) -> None:
  del argv
  cli.check_run_folder("workdir", WORKDIR.value)
  cache_dir = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if cache_dir is None:
    # The next start of this run then loads its programs instead of compiling them.
    cache = absolute(any_path("--workdir", WORKDIR.value)) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if REPLAY_STEP.value is not None:
    replay.replay(cli.load_config(CONFIG), WORKDIR.value, REPLAY_STEP.value)
    return
  try:
    loop.train(cli.load_config(CONFIG), WORKDIR.value)
  except SaveError as error:
    sys.exit(f"error: {error}")
  except Interrupted as stop:
    logger.info("%s; repeat the command to resume", stop)
    # Launchers restart a preempted run, but not one that a person interrupted.
    by_hand = signal.SIGINT in stop.signals
    sys.exit(EXIT_INTERRUPTED if by_hand else EXIT_TRY_AGAIN)


if __name__ == "__main__":
  cli.run(main)
