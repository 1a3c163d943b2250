"""The first state of a run: random, or from trained weights (`config.init`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from mdt_jax import sharding
from mdt_jax.buckets import AnyPath
from mdt_jax.builders import build_process
from mdt_jax.checkpoints.manager import FOLDER
from mdt_jax.checkpoints.weights import Weights, open_weights
from mdt_jax.data.class_labels import DataLabels, class_number
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.experiment import Experiment
from mdt_jax.logs import counted, logger
from mdt_jax.models.registry import Model, init_params
from mdt_jax.pretrained.adaptation import Adaptation
from mdt_jax.pretrained.parameter_starts import KEPT
from mdt_jax.pretrained.tensors import flatten, unflatten
from mdt_jax.sampling.labels import parse_labels
from mdt_jax.setting_groups import InitSettings, split_commas
from mdt_jax.settings import Settings
from mdt_jax.train_state import TrainState
from mdt_jax.training.program import Program
from mdt_jax.types import Array, Params

_CLASSES = "config.init.classes"
# Settings of config.diffusion that decide what the outputs of a network mean, and
# arguments of the processes flow and edm that do.
_MEANING = ("process", "prediction", "schedule", "num_timesteps")
_MEANING_OF_ARGUMENTS = ("path", "prediction", "data_time", "sigma_data")


class Initialization:
  """The start of a run without checkpoints.

  Args:
    experiment: the run; its data must be open.
    workdir: folder of the run. If it holds checkpoints, no weights are opened.

  Raises:
    SettingError: a setting of `config.init`: the weights cannot be read, or do not fit
      the network. Nothing is compiled or written before.
  """

  def __init__(self, experiment: Experiment, workdir: AnyPath):
    self._experiment = experiment
    self._opened: tuple[Weights, Adaptation] | None = None
    if experiment.settings.init.path is not None and not _has_checkpoints(workdir):
      self._opened = self._open(experiment.settings.init.path)

  def skip(self, saved: Settings) -> None:
    """Notes that the run resumes; it keeps the `config.init` of its first start."""
    init = self._experiment.settings.init
    if init.path is not None:
      logger.info(
        "config.init.path is not read: the run resumes from its own checkpoint"
      )
    self.recall(saved)

  def recall(self, saved: Settings) -> None:
    """Takes over the `config.init` of the first start from a checkpoint's settings."""
    self._remember(saved.init)

  def first_state(self, program: Program) -> TrainState:
    """Returns the state at step 0, in its sharding; call it inside the run's mesh."""
    experiment = self._experiment
    key = jax.random.key(experiment.settings.seed)
    if (path := experiment.settings.init.path) is None:
      return program.init(key)
    weights, adaptation = self._opened or self._open(path)
    logger.info("%s", _table(weights, adaptation, path))
    self._warn_of_other_meaning(weights)
    return program.start(_read(adaptation, weights, program.state.params, key))

  def _open(self, path: str) -> tuple[Weights, Adaptation]:
    """Opens the weights and fits them to the network of the run."""
    experiment = self._experiment
    init = experiment.settings.init
    weights = open_weights(init, experiment.model)
    with renamed_in_errors({"path": "config.init.path"}):
      adaptation = Adaptation(
        weights.model,
        experiment.model,
        classes=self._classes(weights),
        patches=init.patches,
        partial=init.partial,
        name=path,
      )
    self._remember(
      dataclasses.replace(init, step=weights.step, checksum=weights.checksum)
    )
    return weights, adaptation

  def _remember(self, init: InitSettings) -> None:
    """Puts `config.init` into the settings that checkpoints and config.json get."""
    settings = self._experiment.settings
    self._experiment.settings = dataclasses.replace(settings, init=init)

  def _classes(self, weights: Weights) -> dict[int, int] | None:
    """New label -> old label, as `config.init.classes` says; None if it is empty."""
    experiment, found = self._experiment, {}
    for item in split_commas(experiment.settings.init.classes):
      old, _, new = item.rpartition(":")
      label = _label(item, new, "new", experiment.model, experiment.data_labels)
      if label in found:
        raise SettingError(_CLASSES, item, f"names the new class {label} again")
      found[label] = _label(item, old, "old", weights.model, weights.data_labels)
    return found or None

  def _warn_of_other_meaning(self, weights: Weights) -> None:
    """Warns if the outputs of the weights mean something else in this run."""
    there: Any = weights.settings.diffusion
    here: Any = self._experiment.settings.diffusion
    names, prefix = _MEANING, ""
    if there.process == here.process != "gaussian":
      there, here = build_process(weights.settings), self._experiment.process
      names, prefix = _MEANING_OF_ARGUMENTS, "arguments."
    for name in names:
      old, new = getattr(there, name, None), getattr(here, name, None)
      if old != new:
        logger.warning(
          "the weights were trained with config.diffusion.%s%s = %r, and this run has "
          "%r: the network must learn anew what its output means",
          prefix,
          name,
          old,
          new,
        )


def _label(
  item: str, name: str, age: str, model: Model, held: DataLabels | None
) -> int:
  """The label of a class by its number or name.

  Args:
    item: the text OLD:NEW that holds the name, for errors.
    name: number or name of the class.
    age: "old" or "new", for errors.
    model: the old or new network.
    held: the labels of the data of that network; None if unknown.
  """
  count = model.num_classes
  try:
    if class_number(name) == count:  # `parse_labels` would speak of the null label
      raise SettingError(_CLASSES, name, f"must be a name, or lie in 0 … {count - 1}")
    return int(parse_labels(_CLASSES, name, count, held=held)[0])
  except SettingError as error:
    accepted = f"{age} class {name!r}: {error.accepted}"
    raise SettingError(_CLASSES, item, accepted) from None


def _has_checkpoints(workdir: AnyPath) -> bool:
  """Whether a workdir holds a checkpoint, complete or not."""
  folder = workdir / FOLDER
  return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _read(adaptation: Adaptation, weights: Weights, like: Params, key: Array) -> Params:
  """Reads and fits one parameter after the other, and gives each device its part.

  Args:
    adaptation: how each parameter starts.
    weights: the weights.
    like: shape, dtype and sharding of each parameter.
    key: random key of the parameters with new values.
  """
  needed = [path for path, start in adaptation.starts.items() if start.needs_new]
  shardings = {path: leaf.sharding for path, leaf in flatten(like).items()}

  @functools.partial(jax.jit, out_shardings={path: shardings[path] for path in needed})
  def draw(key: Array) -> dict[str, Array]:
    params = flatten(init_params(adaptation.target, key))
    return {path: params[path] for path in needed}  # XLA leaves the others out

  new = draw(key) if needed else {}
  found = {}
  for path, sharded in shardings.items():
    fresh = sharding.fetch(new.pop(path)) if path in new else None
    value = adaptation.start(path, weights.read, fresh)
    found[path] = jax.make_array_from_callback(
      value.shape, sharded, functools.partial(np.ndarray.__getitem__, value)
    )
    found[path].block_until_ready()  # or the copies of many parameters would wait
  return unflatten(found)


def _table(weights: Weights, adaptation: Adaptation, path: str) -> str:
  """Lists how each parameter starts; those that are kept as they are by number."""
  rows = adaptation.describe()
  changed = [row for row in rows if row[2] != KEPT]
  kept = counted(len(rows) - len(changed), "parameter")
  step = "" if weights.step is None else f", step {weights.step}"
  lines = [f"starting from {path}{step} (CRC-32 {weights.checksum}): {kept} kept"]
  widths = [max((len(row[i]) for row in changed), default=0) for i in (0, 1)]
  lines += [f"  {p:{widths[0]}}  {s:{widths[1]}}  {how}" for p, s, how in changed]
  return "\n".join(lines)
