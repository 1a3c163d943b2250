"""The ConfigDict of a run: made by a config file, changed by the command line.

`settings.py` and `setting_groups/` describe each setting and its default. The files
in mdt_jax/configs/ change the settings of their run. --config.NAME=VALUE overrides
both.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from mdt_jax.atomic import write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.settings import Settings


def default_config() -> ConfigDict:
  """Returns the default settings: MDTv2-S/2 on ImageNet 256x256.

  The ConfigDict is locked: a misspelt name raises AttributeError.
  """
  return Settings().to_config()


def write_config(settings: Settings, workdir: AnyPath) -> None:
  """Writes config.json for people; a resumed run reads the config in its checkpoint."""
  write_json(workdir / "config.json", settings.to_dict())
