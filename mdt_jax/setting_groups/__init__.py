"""The groups of settings of a run, with their defaults and what they do.

One frozen dataclass holds the settings of a group. In a config file a setting is
`config.GROUP.NAME = VALUE`, on the command line --config.GROUP.NAME=VALUE. The comment
above a setting says what it does, its unit and its range. The defaults are those of
MDTv2-S/2 on ImageNet 256x256. `settings.Settings` holds the groups and the settings
without a group.

  network    ModelSettings, ConditionSettings, ObjectiveSettings, MaskingSettings,
             DiffusionSettings
  training   OptimizerSettings, InitSettings, MeshSettings, LogSettings
  data       DataSettings
  sampling   SamplingSettings, EvalSettings
"""

from mdt_jax.setting_groups.checks import at_least, split_commas
from mdt_jax.setting_groups.data import DataSettings
from mdt_jax.setting_groups.network import (
  ConditionSettings,
  DiffusionSettings,
  MaskingSettings,
  ModelSettings,
  ObjectiveSettings,
)
from mdt_jax.setting_groups.sampling import (
  LABELS_OF_SCORES,
  EvalSettings,
  SamplingSettings,
)
from mdt_jax.setting_groups.training import (
  InitSettings,
  LogSettings,
  MeshSettings,
  OptimizerSettings,
)

__all__ = [
  "LABELS_OF_SCORES",
  "ConditionSettings",
  "DataSettings",
  "DiffusionSettings",
  "EvalSettings",
  "InitSettings",
  "LogSettings",
  "MaskingSettings",
  "MeshSettings",
  "ModelSettings",
  "ObjectiveSettings",
  "OptimizerSettings",
  "SamplingSettings",
  "at_least",
  "split_commas",
]
