"""Checkpoints of a run, by Orbax, with the config beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.training.state import Params, TrainState, init_params

FOLDER = "checkpoints"  # inside a workdir
# Attributes of a network that do not change its parameters.
_NOT_OF_THE_PARAMS = ("dtype", "remat", "unroll", "parent", "name")


class Checkpoints:
  """The checkpoints of a workdir: state, averages and config for some steps.

  Saves are asynchronous and atomic: a step is there as a whole or not at all.
  """

  def __init__(self, workdir: str | Path, to_keep: int):
    self._manager = ocp.CheckpointManager(
      Path(workdir).absolute() / FOLDER,
      options=ocp.CheckpointManagerOptions(max_to_keep=to_keep),
      item_names=("state", "ema", "config"),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, config: ConfigDict) -> None:
    """Saves the state after `step` steps, unless that step is there already."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state.replace(ema=None)),
        ema=ocp.args.StandardSave(state.ema),
        config=ocp.args.JsonSave(config.to_dict()),
      ),
    )

  def restore(self, like: TrainState, config: ConfigDict) -> TrainState:
    """The latest state.

    Args:
      like: shapes, types and shardings of the state.
      config: of the run that goes on.

    Raises:
      SettingError: the checkpoint is of another network, optimizer or averages.
    """
    step = self.latest_step()
    saved = self._manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config
    workdir = str(self._manager.directory.parent)
    _check_same_run(saved, config, workdir)
    if "state" not in self._manager.item_metadata(step):
      raise SettingError(
        "--workdir",
        workdir,
        "holds a converted model, to be sampled; it has no state to train on from",
      )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(like.replace(ema=None)),
        ema=ocp.args.StandardRestore(like.ema),
      ),
    )
    return restored.state.replace(ema=restored.ema)

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.close()


def workdir_of(path: str | Path) -> Path:
  """The workdir that `path`, or the folder "checkpoints" in it, is."""
  folder = Path(path).expanduser().absolute()
  return folder.parent if folder.name == FOLDER else folder


def save_model(
  workdir: str | Path, config: ConfigDict, params: Params, step: int = 0
) -> None:
  """Saves parameters that come from elsewhere, to be sampled as averaged ones.

  Args:
    workdir: folder without checkpoints.
    config: the run that they are of; they are saved as its first average.
    params: parameters of `make_model(config)`.
    step: number of the checkpoint.
  """
  with ocp.CheckpointManager(
    Path(workdir).absolute() / FOLDER, item_names=("ema", "config")
  ) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardSave({str(config.ema_decays[0]): params}),
        config=ocp.args.JsonSave(config.to_dict()),
      ),
    )


def load_ema(
  path: str | Path, step: int | None = None, ema_decay: float | None = None
) -> tuple[ConfigDict, Params, int]:
  """Config and averaged parameters of a checkpoint, from the folder alone.

  Args:
    path: a workdir, or the folder "checkpoints" in it.
    step: of the checkpoint; None for the latest.
    ema_decay: which average; None for config.sampling.ema_decay, else the first.

  Returns:
    (config, params, step).

  Raises:
    SettingError: there is no checkpoint, or none of that step or decay.
  """
  folder = workdir_of(path) / FOLDER
  if not folder.is_dir():
    raise SettingError(
      "--checkpoint", str(path), f"must be a workdir with a folder {FOLDER!r} in it"
    )
  with ocp.CheckpointManager(
    folder,
    item_names=("state", "ema", "config"),
    options=ocp.CheckpointManagerOptions(create=False),
  ) as manager:
    steps = manager.all_steps()
    if not steps:
      raise SettingError("--checkpoint", str(path), "holds no finished checkpoint")
    step = max(steps) if step is None else step
    check_choice("--step", step, sorted(steps))
    saved = manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config
    config = config_from_dict(saved)
    decay = ema_decay if ema_decay is not None else settings.sampled_decay(config)
    check_choice("--ema_decay", decay, config.ema_decays)
    model = settings.make_model(config)
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    ema = manager.restore(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.PyTreeRestore(
          {str(decay): abstract},
          restore_args=ocp.checkpoint_utils.construct_restore_args(
            {str(decay): abstract}
          ),
          partial_restore=True,
        )
      ),
    ).ema
  return config, ema[str(decay)], step


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
  """A config as it was saved; settings that came later have their defaults."""
  config = settings.default_config()
  with config.unlocked():
    config.update(saved)
  config.ema_decays = tuple(saved["ema_decays"])
  config.sampling.cfg_interval = tuple(config.sampling.cfg_interval)
  return config


def _check_same_run(saved: dict[str, Any], config: ConfigDict, workdir: str) -> None:
  old, new = _identity(config_from_dict(saved)), _identity(config)
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
  model = dataclasses.asdict(settings.make_model(config))
  identity = {
    f"config.model.{name}": value
    for name, value in model.items()
    if name not in _NOT_OF_THE_PARAMS
  }
  identity["config.optimizer.name"] = config.optimizer.name
  identity["config.ema_decays"] = tuple(config.ema_decays)
  identity["config.timestep_sampler"] = config.timestep_sampler
  for name in ("schedule", "num_timesteps", "prediction", "variance"):
    identity[f"config.diffusion.{name}"] = config.diffusion[name]
  return identity
