"""All settings of a run: `Settings` holds the groups of `setting_groups`.

The settings of `Settings` itself have no group: `config.batch_size = 64` in a config
file, --config.batch_size=64 on the command line. `Settings.from_config` turns a
ConfigDict into settings and checks each one; `mdt_jax.build` builds the objects of a
run and checks that the settings fit together. An error names the setting as
`config.GROUP.NAME`.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.errors import SettingError, check_choice, check_range, named_in_errors
from mdt_jax.logs import logger
from mdt_jax.setting_groups import (
  ConditionSettings,
  DataSettings,
  DiffusionSettings,
  EvalSettings,
  InitSettings,
  LogSettings,
  MaskingSettings,
  MeshSettings,
  ModelSettings,
  ObjectiveSettings,
  OptimizerSettings,
  SamplingSettings,
  at_least,
)
from mdt_jax.setting_limits import MAX_STEPS, check_maxima
from mdt_jax.typed_config import known_settings, parse, parse_value, to_config

MAX_PROFILED = 100  # steps; no program opens the trace of more


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run: those of each group, and those without a group."""

  # Seed of every random draw, in [0, 2**32). A draw depends on the seed and the step.
  seed: int = 0
  # Training steps of the whole run, at least 1.
  num_steps: int = 400_000
  # Images in a step, over all devices; divisible by the devices that divide the batch.
  batch_size: int = 256
  # Parts of a batch that are computed one after another, to save memory; at least 1.
  accumulation_steps: int = 1
  model: ModelSettings = ModelSettings()
  condition: ConditionSettings = ConditionSettings()
  init: InitSettings = InitSettings()
  objective: ObjectiveSettings = ObjectiveSettings()
  masking: MaskingSettings = MaskingSettings()
  diffusion: DiffusionSettings = DiffusionSettings()
  # How training draws timesteps: uniform, or loss-second-moment (importance sampling
  # by the recent losses).
  timestep_sampler: str = "uniform"
  optimizer: OptimizerSettings = OptimizerSettings()
  # Decays of the averages of the parameters, each in [0, 1). Every decay adds a copy of
  # the parameters. The first average is sampled.
  ema_decays: tuple[float, ...] = (0.9999,)
  # Whether averages follow the parameters faster at first, for short runs: the decay of
  # step n = 0, 1, … is at most (1 + n) / (10 + n).
  ema_warmup: bool = False
  # Steps between updates of the averages, in [1, num_steps]. An update has the decay to
  # the power of this number, and is left out if its step is skipped. Fewer updates read
  # and write less memory; steps after the last multiple are not averaged.
  ema_every: int = 1
  data: DataSettings = DataSettings()
  mesh: MeshSettings = MeshSettings()
  sampling: SamplingSettings = SamplingSettings()
  eval: EvalSettings = EvalSettings()
  log: LogSettings = LogSettings()
  # Steps between log lines and points of the curves, at least 1.
  log_every: int = 100
  # Steps to trace, FIRST:LAST without LAST, counted from 0: 100:105 traces five steps.
  # At most 100 steps. WORKDIR/tensorboard receives the trace. None: no trace.
  profile: str | None = None
  # Processes that write the trace of `profile`: first or all.
  profile_processes: str = "first"
  # Steps between checkpoints, at least 1. The last step is always saved.
  checkpoint_every: int = 10_000
  # Minutes after which a checkpoint is saved in any case; 0: by steps alone.
  checkpoint_minutes: float = 0.0
  # Number of latest checkpoints to keep, at least 2.
  checkpoints_to_keep: int = 2
  # Also keep the checkpoints of multiples of this number of steps; 0: none.
  checkpoint_keep_every: int = 0
  # Saves that may fail in a row before the run stops, at least 1.
  save_failures: int = 5
  # Seconds from SIGTERM or Ctrl-C until the process ends, saved or not; at least 1.
  grace_seconds: float = 60.0
  # Steps that may be skipped because their loss or gradient is not finite, at least 0.
  # One more stops the run, or rolls it back.
  max_skipped: int = 10
  # How often the run may go back to its last checkpoint and leave out the batches
  # since, instead of stopping; at least 0.
  max_rollbacks: int = 0
  # Steps between pictures of samples, at least 0; 0: no pictures.
  sample_every: int = 10_000
  # Images in a picture, at least 0; 0: no pictures.
  num_samples: int = 16
  # Images of which a second picture shows the way from noise: what the network predicts
  # at eight steps of the sampler. At least 0; 0: none, as for the samplers in time.
  num_strips: int = 4

  @classmethod
  def from_config(cls, config: ConfigDict) -> Settings:
    """Returns the settings of a config that has all of them, and checks each one.

    Raises:
      SettingError: a setting is missing, unknown, of another type or out of range.
    """
    settings = parse(cls, config, "config")
    settings.check()
    return settings

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Settings:
    """Returns the settings in a checkpoint's JSON; missing ones have their defaults."""
    return cls.from_config(config_from_dict(saved))

  def to_config(self) -> ConfigDict:
    """Returns a locked ConfigDict; only the groups `arguments` take new names."""
    config = to_config(self).lock()
    for name in ("objective", "diffusion", "optimizer", "data", "sampling"):
      group: Any = config[name]
      group.arguments.unlock()
    return config

  def to_dict(self) -> dict[str, Any]:
    """Returns nested dicts, as checkpoints hold them."""
    return self.to_config().to_dict()

  def check(self) -> None:
    """Raises SettingError for the first setting that is out of its range."""
    with named_in_errors("config"):
      for name in ("num_steps", "batch_size", "accumulation_steps", "log_every"):
        at_least(self, name, 1)
      at_least(self, "checkpoint_every", 1)
      # A single checkpoint would be removed before the next one is complete.
      at_least(self, "checkpoints_to_keep", 2)
      for name in ("seed", "sample_every", "num_samples", "checkpoint_minutes"):
        at_least(self, name, 0)
      at_least(self, "num_strips", 0)
      for name in ("checkpoint_keep_every", "max_skipped", "max_rollbacks"):
        at_least(self, name, 0)
      for name in ("save_failures", "grace_seconds"):
        at_least(self, name, 1)
      if self.seed >= 2**32:
        raise SettingError("seed", self.seed, "must be below 2**32")
      check_range("ema_every", self.ema_every, 1, self.num_steps)
      check_choice("profile_processes", self.profile_processes, ("first", "all"))
      if self.profile is not None and not self.profiled_steps:
        raise SettingError(
          "profile",
          self.profile,
          f"must be FIRST:LAST, 0 <= FIRST < LAST <= num_steps = {self.num_steps}, of "
          f"at most {MAX_PROFILED} steps, such as 100:105",
        )
    with named_in_errors("config.condition"):
      self.condition.check_use(self.model.condition)
    for group in ("init", "data", "optimizer", "eval", "log"):
      with named_in_errors(f"config.{group}"):
        getattr(self, group).check()
    decays = self.ema_decays
    if not decays or not all(
      isinstance(decay, (int, float)) and 0 <= decay < 1 for decay in decays
    ):
      raise SettingError(
        "config.ema_decays", decays, "must be one or more numbers in [0, 1)"
      )
    self._check_sampling()
    check_maxima(dataclasses.asdict(self))

  @property
  def profiled_steps(self) -> range:
    """Steps to trace, counted from 0; empty without a valid `profile`."""
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", self.profile or "")
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    is_valid = len(steps) <= MAX_PROFILED and steps.stop <= self.num_steps
    return steps if is_valid else range(0)

  @property
  def sampled_decay(self) -> float:
    """Decay of the averaged parameters that are sampled, as in `ema_decays`.

    Its text is a name in checkpoints, where 0 and 0.0 differ.
    """
    chosen = self.sampling.ema_decay
    if chosen is None:
      return self.ema_decays[0]
    return next((decay for decay in self.ema_decays if decay == chosen), chosen)

  def with_sampling(self, changes: Mapping[str, Any]) -> Settings:
    """Returns these settings with changed settings of sampling.

    Args:
      changes: settings of config.sampling, such as {"num_steps": 50}; not ema_decay,
        which belongs to the parameters.

    Raises:
      SettingError: a name is unknown, or a value cannot be used.
    """
    known = {field.name for field in dataclasses.fields(SamplingSettings)}
    for name, value in changes.items():
      if name not in known:
        accepted = ", ".join(sorted(known))
        raise SettingError(name, value, f"is no setting of sampling: {accepted}")
      if name == "ema_decay":
        raise SettingError(
          f"config.sampling.{name}",
          value,
          "is chosen when a checkpoint is loaded: by --ema_decay, or "
          "Pipeline.from_checkpoint(…, ema_decay=…)",
        )
    if changes.get("method", self.sampling.method) != self.sampling.method:
      changes = {"arguments": {}, **changes}  # those of the run are of its method
    types_of = typing.get_type_hints(SamplingSettings)
    parsed = {
      name: parse_value(value, types_of[name], f"config.sampling.{name}")
      for name, value in changes.items()
    }
    changed = dataclasses.replace(
      self, sampling=dataclasses.replace(self.sampling, **parsed)
    )
    changed._check_sampling()
    return changed

  def with_data(self, **changes: Any) -> Settings:
    """Returns these settings with changed settings of data, such as path or vae."""
    return dataclasses.replace(self, data=dataclasses.replace(self.data, **changes))

  def with_attention_kernel(self, kernel: str) -> Settings:
    """Returns these settings with another config.model.attention_kernel."""
    model = dataclasses.replace(self.model, attention_kernel=kernel)
    return dataclasses.replace(self, model=model)

  def with_ema_decay(self, ema_decay: float) -> Settings:
    """Returns these settings with another average to sample."""
    sampling = dataclasses.replace(self.sampling, ema_decay=ema_decay)
    return dataclasses.replace(self, sampling=sampling)

  def _check_sampling(self) -> None:
    sampling = self.sampling
    with named_in_errors("config.sampling"):
      sampling.check()
      is_gaussian = self.diffusion.process == "gaussian"
      total = self.diffusion.num_timesteps if is_gaussian else MAX_STEPS
      if sampling.num_steps < 1 or sampling.num_steps > total >= 1:
        limit = f"config.diffusion.num_timesteps = {total}"
        raise SettingError(
          "num_steps",
          sampling.num_steps,
          f"must lie in [1, {limit if is_gaussian else format(MAX_STEPS, ',')}]",
        )
      # A condition of your own may ignore label_dropout; the network's check sees it.
      is_label = self.model.condition == "label"
      if is_label and sampling.needs_null and self.model.label_dropout == 0:
        raise SettingError(
          "cfg_scale",
          sampling.cfg_scale,
          "must be 1: config.model.label_dropout = 0 trains no null label",
        )
      if sampling.ema_decay is not None:
        check_choice("ema_decay", sampling.ema_decay, self.ema_decays)


def config_from_dict(saved: Mapping[str, Any]) -> ConfigDict:
  """Returns the config in a checkpoint's JSON.

  Settings that the JSON lacks have their defaults. Settings that this version does not
  know are left out with a warning.
  """
  saved, unknown = known_settings(saved, Settings(), "config")
  if unknown:
    logger.warning("ignored settings of another version: %s", ", ".join(unknown))
  masking = dict(saved.get("masking", {}))
  objective = dict(saved.get("objective", {}))
  # Earlier versions ignored the width of a ratio of 0, and masked no tokens with 0, 0.
  name, ratio = objective.get("name"), masking.get("ratio")
  if name is None and ratio == 0:
    masking["width"] = 0.0
  elif name == "mdt" and ratio == 0 and masking.get("width") == 0:
    objective["name"] = "mdt_unmasked"
  saved = {**saved, "masking": masking, "objective": objective}
  if "ema_decays" in saved:
    saved["ema_decays"] = tuple(saved["ema_decays"])
  sampling = dict(saved.get("sampling", {}))
  if "cfg_interval" in sampling:
    sampling["cfg_interval"] = tuple(sampling["cfg_interval"])
  config = Settings().to_config()
  with config.unlocked():
    config.update({**saved, "sampling": sampling})
  return config
