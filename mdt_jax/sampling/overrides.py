"""Other settings than those of the run, for a call or a command that samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories
from mdt_jax.errors import SettingError


def with_sampling(config: ConfigDict, sampling: Mapping[str, Any]) -> ConfigDict:
  """A copy of a config with other settings of sampling, which are checked.

  Those alone: the others are of the training, whose devices need not be here.

  Args:
    config: of a run.
    sampling: settings of config.sampling, such as {"num_steps": 50}; not ema_decay,
      which the parameters at hand are of already.

  Raises:
    SettingError: one is no setting of sampling, or cannot be used.
  """
  config = config.copy_and_resolve_references()
  for name, value in sampling.items():
    if name not in config.sampling:
      accepted = ", ".join(sorted(config.sampling))
      raise SettingError(name, value, f"is no setting of sampling: {accepted}")
    if name == "ema_decay":
      raise SettingError(
        f"config.sampling.{name}",
        value,
        "is chosen when a checkpoint is loaded: by --ema_decay, or "
        "Pipeline.from_checkpoint(…, ema_decay=…)",
      )
    try:
      config.sampling[name] = value
    except TypeError:
      kind = config.sampling.get_type(name).__name__
      raise SettingError(
        f"config.sampling.{name}", value, f"must be of type {kind}"
      ) from None
  settings.check_sampling(config)
  return config


def with_vae(config: ConfigDict, vae: str | None) -> ConfigDict:
  """A copy of a config with another autoencoder; None for that of the run.

  Raises:
    SettingError: the network draws pixels, which nothing decodes.
  """
  config = config.copy_and_resolve_references()
  if vae is not None and factories.holds_pixels(config):
    raise SettingError("vae", vae, "must be left out: this model draws pixels")
  config.data.vae = vae or config.data.vae
  return config
