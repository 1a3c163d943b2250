"""Trains from a config: python -m mdt_jax.main --config=configs/digits.py --workdir=DIR

A rerun of the same command goes on from the last checkpoint. Any setting is
overridden on the command line: --config.batch_size=64.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from mdt_jax import cli
from mdt_jax.errors import SettingError
from mdt_jax.training import loop

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Python file with get_config().", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, TensorBoard events and pictures."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  del argv
  try:
    loop.train(_load_config(), WORKDIR.value)
  except loop.Interrupted as stop:
    loop.logger.info("%s; the same command goes on from there", stop)
    sys.exit(cli.EXIT_INTERRUPTED)


def _load_config() -> ConfigDict:
  try:
    return CONFIG.value.copy_and_resolve_references()
  except OSError:  # what a missing file gives, at its first use
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    raise SettingError(
      "--config", path, "must be a Python file with get_config()"
    ) from None


if __name__ == "__main__":
  cli.run(main)
