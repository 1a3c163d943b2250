"""The ConfigDict of a run, as config files make it and the command line changes it.

`mdt_jax.settings` documents each setting; files in configs/ change what their run
needs, and `--config.name=value` on the command line has the last word.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mdt_jax.atomic import write_json
from mdt_jax.settings import Settings


def default_config() -> ConfigDict:
  """The settings of MDTv2-S/2 on ImageNet 256x256, locked: no field can be added."""
  return Settings().to_config()


def write_config(settings: Settings, workdir: Path) -> None:
  """Writes config.json for people to read; checkpoints hold the config that counts."""
  write_json(workdir / "config.json", settings.to_dict())
