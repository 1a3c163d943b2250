"""Parameters of a checkpoint, to be sampled; and checkpoints of converted ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mdt_jax.checkpoints import checksums
from mdt_jax.checkpoints.manager import FOLDER, restore_args, restore_config
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.models.registry import Model, abstract_params
from mdt_jax.own_parts import OwnParts
from mdt_jax.settings import MeshSettings, Settings
from mdt_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Averaged parameters and the run that they are of.

  Attributes:
    experiment: the run; its mesh is all devices here, not those of the training, and
      `settings.sampling.ema_decay` is the decay of `params`.
    params: averaged parameters, on the first device.
    step: steps of training.
  """

  experiment: Experiment
  params: Params
  step: int


def workdir_of(path: str | Path) -> Path:
  """The workdir that `path`, or the folder "checkpoints" in it, is."""
  folder = Path(path).expanduser().absolute()
  return folder.parent if folder.name == FOLDER else folder


def save_model(
  workdir: str | Path, settings: Settings, params: Params, step: int = 0
) -> None:
  """Saves parameters that come from elsewhere, to be sampled as averaged ones.

  Args:
    workdir: folder without checkpoints.
    settings: the run that they are of; they are saved as its first average.
    params: parameters of its network.
    step: number of the checkpoint.
  """
  with ocp.CheckpointManager(
    Path(workdir).absolute() / FOLDER, item_names=("ema", "config")
  ) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardSave({str(settings.ema_decays[0]): params}),
        config=ocp.args.JsonSave(settings.to_dict()),
      ),
    )
  checksums.write_checksums(Path(workdir).absolute() / FOLDER / str(step))


def load_ema(
  path: str | Path,
  step: int | None = None,
  ema_decay: float | None = None,
  model: Model | None = None,
) -> Checkpoint:
  """The run and averaged parameters of a checkpoint, from the folder alone.

  Args:
    path: a workdir, or the folder "checkpoints" in it.
    step: of the checkpoint; None for the latest that is not damaged.
    ema_decay: which average; None for config.sampling.ema_decay, else the first.
    model: a network of your own that the run was trained with; None builds the network
      that the config of the run names.

  Raises:
    SettingError: there is no checkpoint, or none of that step or decay, or it is
      damaged, or its parameters do not fit the network.
  """
  folder = workdir_of(path) / FOLDER
  if not folder.is_dir():
    raise SettingError(
      "path", str(path), f"must be a workdir with a folder {FOLDER!r} in it"
    )
  with ocp.CheckpointManager(
    folder,
    item_names=("state", "ema", "config"),
    options=ocp.CheckpointManagerOptions(create=False),
  ) as manager:
    steps = manager.all_steps()
    if not steps:
      raise SettingError("path", str(path), "holds no finished checkpoint")
    step = _undamaged_step(folder, steps, step)
    settings = Settings.from_dict(restore_config(manager, step))
    decay = settings.sampled_decay if ema_decay is None else ema_decay
    check_choice("ema_decay", decay, settings.ema_decays)
    settings = dataclasses.replace(settings.with_ema_decay(decay), mesh=MeshSettings())
    experiment = Experiment(settings, own=OwnParts(model=model))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      abstract_params(experiment.model),
    )
    _check_fits(experiment, abstract, folder / str(step) / "ema", str(decay))
    restored = manager.restore(
      step,
      args=ocp.args.Composite(ema=restore_args({str(decay): abstract}, partial=True)),
    )
  return Checkpoint(experiment, restored["ema"][str(decay)], step)


def _check_fits(
  experiment: Experiment, params: Params, folder: Path, decay: str
) -> None:
  """Raises SettingError where a checkpoint holds parameters of another network.

  Args:
    experiment: the run, for the name of its network.
    params: shapes of the parameters of its network.
    folder: of the averages in the checkpoint.
    decay: which average.
  """
  # The handler, as a Checkpointer warns of a file that checkpoints need not have.
  saved: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
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
      f"does not fit the parameters of the checkpoint ({len(differing)} differ: "
      f"{name} is {here}, in the checkpoint {there}, …): give the network that the run "
      "was trained with",
    )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  """Shapes of arrays, or of their descriptions, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }


def _undamaged_step(folder: Path, steps: Iterable[int], asked: int | None) -> int:
  """The step asked for, or else the latest whose averages are not damaged."""
  if asked is not None:
    check_choice("step", asked, sorted(steps))
  damage = None
  for step in sorted(steps, reverse=True) if asked is None else [asked]:
    damage = checksums.damage(folder / str(step), items=("ema", "config"))
    if damage is None:
      return step
    logger.warning("the checkpoint of step %d is passed over: %s", step, damage)
  raise SettingError("path", str(folder.parent), f"is damaged: {damage}")
