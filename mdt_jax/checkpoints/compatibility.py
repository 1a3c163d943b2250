"""Checks that a checkpoint belongs to the run that resumes from the checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import traverse_util

from mdt_jax.errors import SettingError, describe_changes
from mdt_jax.experiment import Experiment
from mdt_jax.settings import Settings

# Attributes of a network that `_attributes` leaves out: they do not change the
# parameters, except `condition`, which `_identity` compares.
_NOT_OF_THE_PARAMS = (
  "dtype",
  "remat",
  "unroll",
  "forward_mode",
  "sow_attention",
  "attention_kernel",
  "parent",
  "name",
  "condition",
)


def check_same_run(saved: Settings, experiment: Experiment, workdir: str) -> None:
  """Raises SettingError if a checkpoint belongs to another run.

  The check compares the network, diffusion process, optimizer and timestep sampler. No
  average may be missing. Other settings, such as the learning rate, may change when a
  run is resumed, and averages may be added.

  Args:
    saved: settings of the checkpoint.
    experiment: the run that resumes.
    workdir: folder that holds the checkpoint, for the error.
  """
  current = experiment.settings
  old, new = _identity(saved), _identity(current)
  if (saved.model, saved.diffusion) != (current.model, current.diffusion):
    # The same network may be set by name, or attribute by attribute.
    old |= _attributes(Experiment(saved))
    new |= _attributes(experiment)
  if differences := describe_changes({name: old.get(name) for name in new}, new):
    raise SettingError(
      "--workdir",
      workdir,
      f"holds checkpoints of another run ({'; '.join(differences)}): "
      "set another folder, or the settings of that run",
    )
  if missing := set(saved.ema_decays) - set(current.ema_decays):
    decays = ", ".join(map(str, sorted(missing)))
    raise SettingError(
      "config.ema_decays",
      tuple(current.ema_decays),
      f"must hold the decays of the run in {workdir} too ({decays} is missing); "
      "further decays may be added",
    )


def changed_settings(saved: Settings, current: Settings) -> list[str]:
  """Describes the settings that differ, such as "config.batch_size was 8, now 16"."""
  old, new = (
    traverse_util.flatten_dict({"config": settings.to_dict()}, sep=".")
    for settings in (saved, current)
  )
  return describe_changes(old, new)


def _attributes(experiment: Experiment) -> dict[str, Any]:
  """The attributes of the network that its parameters depend on."""
  attributes = dataclasses.asdict(experiment.model)
  return {
    f"config.model.{name}": value
    for name, value in attributes.items()
    if name not in _NOT_OF_THE_PARAMS
  }


def _identity(settings: Settings) -> dict[str, Any]:
  """The settings that must not change when a run is resumed, without the network."""
  diffusion = settings.diffusion
  names = (
    "process",
    "arguments",
    "schedule",
    "num_timesteps",
    "prediction",
    "variance",
  )
  return {
    "config.optimizer.name": settings.optimizer.name,
    # Clipping adds a transformation to the optimizer, and so an entry to its state.
    "config.optimizer.clip_norm > 0": settings.optimizer.clip_norm > 0,
    # Frozen parameters have no state, and each learning rate has its own.
    "config.optimizer.frozen": settings.optimizer.frozen,
    "config.optimizer.learning_rates": settings.optimizer.learning_rates,
    "config.timestep_sampler": settings.timestep_sampler,
    "config.model.condition": settings.model.condition,
    **{
      f"config.condition.{name}": getattr(settings.condition, name)
      for name in ("vector_size", "vector_norm", "tokens_length", "tokens_size")
    },
    **{f"config.diffusion.{name}": getattr(diffusion, name) for name in names},
  }
