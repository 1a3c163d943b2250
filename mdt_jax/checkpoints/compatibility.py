"""Whether a checkpoint is of the run that would go on from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.errors import SettingError

# Attributes of a network that do not change its parameters.
_NOT_OF_THE_PARAMS = ("dtype", "remat", "unroll", "parent", "name")


def check_same_run(saved: ConfigDict, config: ConfigDict, workdir: str) -> None:
  """Raises SettingError where the arrays of a checkpoint are not those of `config`.

  Args:
    saved: config of the checkpoint.
    config: of the run that would go on.
    workdir: that holds the checkpoint, for the error.
  """
  old, new = _identity(saved), _identity(config)
  differences = [
    f"{name} was {old[name]!r}, now {new[name]!r}"
    for name in new
    if old[name] != new[name]
  ]
  if differences:
    raise SettingError(
      "--workdir",
      workdir,
      f"holds checkpoints of another run ({'; '.join(differences)}): "
      "take another folder, or the settings of that run",
    )


def _identity(config: ConfigDict) -> dict[str, Any]:
  """What the arrays of a checkpoint belong to."""
  model = dataclasses.asdict(factories.make_model(config))
  identity = {
    f"config.model.{name}": value
    for name, value in model.items()
    if name not in _NOT_OF_THE_PARAMS
  }
  identity["config.optimizer.name"] = config.optimizer.name
  # Clipping is one more transformation, whose state stands beside the moments.
  identity["config.optimizer.clip_norm > 0"] = config.optimizer.clip_norm > 0
  identity["config.ema_decays"] = tuple(config.ema_decays)
  identity["config.timestep_sampler"] = config.timestep_sampler
  for name in ("schedule", "num_timesteps", "prediction", "variance"):
    identity[f"config.diffusion.{name}"] = config.diffusion[name]
  return identity
