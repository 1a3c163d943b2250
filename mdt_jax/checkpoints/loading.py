"""Loads averaged parameters from a workdir, and saves converted parameters to one."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mdt_jax.attention_choice import with_possible_kernel
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints import checksums
from mdt_jax.checkpoints.manager import FOLDER
from mdt_jax.checkpoints.restoring import restore_args, restore_config
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.models.registry import Model, abstract_params
from mdt_jax.own_parts import OwnParts
from mdt_jax.paths import absolute, any_path
from mdt_jax.setting_groups import MeshSettings
from mdt_jax.settings import Settings
from mdt_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Averaged parameters of a checkpoint, with the objects of the run.

  Attributes:
    experiment: objects of the run. The mesh holds the current devices, not those of the
      training. `experiment.settings.sampling.ema_decay` is the decay of `params`.
    params: averaged parameters, float32, on the first local device.
    step: number of training steps.
  """

  experiment: Experiment
  params: Params
  step: int


def workdir_of(path: str | os.PathLike[str]) -> AnyPath:
  """The absolute path of a workdir, from `path` = WORKDIR or WORKDIR/checkpoints."""
  folder = absolute(path)
  return folder.parent if folder.name == FOLDER else folder


def save_model(
  workdir: str | os.PathLike[str], settings: Settings, params: Params, step: int = 0
) -> None:
  """Saves parameters as a checkpoint that `load_ema` loads; training cannot resume it.

  Args:
    workdir: folder without checkpoints.
    settings: settings of a run with this network. The parameters are saved as the
      average with the first decay, `settings.ema_decays[0]`.
    params: parameters of the network, float32.
    step: step number of the checkpoint.
  """
  with ocp.CheckpointManager(
    absolute(workdir) / FOLDER, item_names=("ema", "config")
  ) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardSave({str(settings.ema_decays[0]): params}),
        config=ocp.args.JsonSave(settings.to_dict()),
      ),
    )
  checksums.write_checksums(absolute(workdir) / FOLDER / str(step))


@dataclasses.dataclass(frozen=True)
class FoundEma:
  """Averaged parameters of a checkpoint that are not read yet.

  Attributes:
    experiment, step: see `Checkpoint`.
    decay: decay of the average, as text.
    folder: folder of the checkpoint.
    shapes: shape and dtype of each parameter.
  """

  experiment: Experiment
  step: int
  decay: str
  folder: AnyPath
  shapes: Params


def load_ema(
  path: str | os.PathLike[str],
  step: int | None = None,
  ema_decay: float | None = None,
  model: Model | None = None,
) -> Checkpoint:
  """Loads averaged parameters and the settings of their run from a workdir.

  Args:
    path: a workdir, or the folder "checkpoints" in a workdir.
    step: step of the checkpoint; None for the latest undamaged checkpoint.
    ema_decay: decay of the average; None for config.sampling.ema_decay of the run, or,
      if that is None too, the first decay of config.ema_decays.
    model: your own network, if the run was trained with one; None builds the network
      that the config of the run describes.

  Returns:
    The parameters and the objects of the run; see `Checkpoint`.

  Raises:
    SettingError: there is no such checkpoint or average, or the checkpoint is damaged
      or does not fit the network.
  """
  found = find_ema(path, step, ema_decay, model)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), found.shapes
  )
  return Checkpoint(found.experiment, _restore(found, abstract), found.step)


def _restore(found: FoundEma, like: Params) -> Params:
  """Reads averaged parameters; those that `like` lacks are not read."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    args = restore_args({found.decay: like}, partial=True)
    return checkpointer.restore(found.folder / "ema", args)[found.decay]


def read_parameter(found: FoundEma, path: str) -> np.ndarray:
  """Reads one averaged parameter, such as "final_layer/linear/bias", to the host."""
  leaf = functools.reduce(lambda tree, name: tree[name], path.split("/"), found.shapes)
  keys = [found.decay, *path.split("/")]
  like: Any = functools.reduce(lambda tree, key: {key: tree}, reversed(keys), leaf)
  args = ocp.args.PyTreeRestore(
    like,
    restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like),
    partial_restore=True,
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(found.folder / "ema", args)
  return functools.reduce(lambda tree, key: tree[key], keys, restored)


def find_ema(
  path: str | os.PathLike[str],
  step: int | None = None,
  ema_decay: float | None = None,
  model: Model | None = None,
) -> FoundEma:
  """Finds and checks the averaged parameters of a workdir; see `load_ema`."""
  folder = workdir_of(any_path("path", path)) / FOLDER
  if not folder.is_dir():
    raise SettingError(
      "path", str(path), f"must be the folder of a run: no {FOLDER!r} in it"
    )
  with ocp.CheckpointManager(
    folder,
    item_names=("state", "ema", "config"),
    options=ocp.CheckpointManagerOptions(create=False),
  ) as manager:
    steps = manager.all_steps()
    if not steps:
      raise SettingError("path", str(path), "holds no complete checkpoint")
    step = _undamaged_step(folder, steps, step)
    settings = Settings.from_dict(restore_config(manager, step))
  decay = settings.sampled_decay if ema_decay is None else ema_decay
  check_choice("ema_decay", decay, settings.ema_decays)
  settings = dataclasses.replace(settings.with_ema_decay(decay), mesh=MeshSettings())
  decay = settings.sampled_decay
  settings = with_possible_kernel(settings)
  experiment = Experiment(settings, own=OwnParts(model=model))
  experiment.data_labels = DataLabels.read(folder.parent, experiment.model.num_classes)
  shapes = abstract_params(experiment.model)
  _check_fits(experiment, shapes, folder / str(step) / "ema", str(decay))
  return FoundEma(experiment, step, str(decay), folder / str(step), shapes)


def _check_fits(
  experiment: Experiment, params: Params, folder: AnyPath, decay: str
) -> None:
  """Raises SettingError if a checkpoint holds the parameters of another network.

  Args:
    experiment: the run, for the name of the network.
    params: shapes of the network's parameters.
    folder: folder of the averages in the checkpoint.
    decay: decay of the average, as text.
  """
  # A Checkpointer would warn about an optional file that these checkpoints lack.
  saved: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
  check_choice("ema_decay", decay, saved.tree)  # `save_model` writes one average
  needed, held = _shapes(params), _shapes(saved.tree[decay])
  differing = sorted(
    name for name in needed | held if needed.get(name) != held.get(name)
  )
  if differing:
    name = differing[0]
    here, there = (shapes.get(name, "absent") for shapes in (needed, held))
    raise SettingError(
      "model",
      experiment.model_name,
      f"does not fit the checkpoint: {len(differing)} parameters differ, such as "
      f"{name}: {here} in the network, {there} in the checkpoint; pass the network of "
      "the training run",
    )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  """Shape of each array, or array description, by its path in the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }


def _undamaged_step(folder: AnyPath, steps: Iterable[int], asked: int | None) -> int:
  """Returns `asked`, or the latest step if None, whose averages are not damaged.

  Raises:
    SettingError: `asked` does not exist, or every candidate is damaged.
  """
  if asked is not None:
    check_choice("step", asked, sorted(steps))
  damage = None
  for step in sorted(steps, reverse=True) if asked is None else [asked]:
    damage = checksums.damage(folder / str(step), items=("ema", "config"))
    if damage is None:
      return step
    logger.warning("skipping the damaged checkpoint at step %d: %s", step, damage)
  raise SettingError("path", str(folder.parent), f"is damaged: {damage}")
