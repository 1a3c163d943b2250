"""Trained weights that a new run starts from, read one parameter at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints import checksums, converted, hub_folders, loading
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.models.registry import Model, create_model
from mdt_jax.paths import any_path
from mdt_jax.pretrained import (
  bucket_weights,
  diffusers_dit,
  hub,
  torch_mdt,
  torch_sprint,
)
from mdt_jax.pretrained.diffusers_folders import CONFIG_FILE
from mdt_jax.setting_groups import InitSettings
from mdt_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights of a network, of which nothing but names and shapes is in memory.

  Attributes:
    model: the network.
    settings: settings of its run; those of the papers for a file that states none.
    read: path of a parameter, such as "pos_embed" -> its value, float32.
    step: number of training steps; None for a file.
    checksum: CRC-32 of the file or of the checkpoint, 8 hexadecimal digits.
    data_labels: the labels of the training data; None if unknown.
  """

  model: Model
  settings: Settings
  read: Callable[[str], np.ndarray]
  step: int | None
  checksum: str
  data_labels: DataLabels | None = None


def open_weights(init: InitSettings, target: Model) -> Weights:
  """Opens the weights that `config.init` names; reads no parameter.

  Args:
    init: the settings; `path` must be given.
    target: the network that starts from the weights. It has the number of heads of a
      DiT whose file does not show it.

  Raises:
    SettingError: a setting of `config.init`: there are no such weights, they are
      damaged, or they are those of an unknown network.
  """
  assert init.path is not None
  names = {name: f"config.init.{name}" for name in ("path", "step", "ema_decay")}
  names |= {name: f"config.init.{name}" for name in ("network", "num_classes")}
  with renamed_in_errors(names):
    if hub.is_hub_url(init.path):
      weights = _open_hub(init, target)
    else:
      path = any_path("path", init.path)
      folder = loading.workdir_of(path) / loading.FOLDER
      is_local = isinstance(folder, Path)
      if os.path.isdir(folder) if is_local else folder.is_dir():
        weights = _open_run(path, init)
      else:
        weights = _open_file(path, init, target)
    if init.checksum not in (None, weights.checksum):
      raise SettingError(
        "config.init.checksum",
        init.checksum,
        f"must be {weights.checksum}, the CRC-32 of {init.path}: the weights are "
        "not those that the run was meant to start from",
      )
  return weights


def _open_hub(init: InitSettings, target: Model) -> Weights:
  """Opens a file of the hub; errors name its address, not its place in the cache."""
  assert init.path is not None
  file = hub.download("path", init.path)
  try:
    return _open_file(file, init, target)
  except SettingError as error:
    value = init.path if error.setting == "path" else error.value
    accepted = error.accepted.replace(str(file), init.path)
    raise SettingError(error.setting, value, accepted) from None


def _open_run(path: AnyPath, init: InitSettings) -> Weights:
  """Opens averaged parameters of a workdir."""
  for name in ("network", "num_classes"):
    if getattr(init, name) is not None:
      raise SettingError(name, getattr(init, name), "is for files, not for a workdir")
  found = loading.find_ema(path, init.step, init.ema_decay)
  experiment = found.experiment
  return Weights(
    experiment.model,
    experiment.settings,
    functools.partial(loading.read_parameter, found),
    found.step,
    checksums.checksum_of(found.folder),
    experiment.data_labels,
  )


# Attributes that tensors may not show.
_HEADS = ("num_heads", "mixer_num_heads", "decoder_num_heads")


def _open_file(path: AnyPath, init: InitSettings, target: Model) -> Weights:
  """Opens a PyTorch file or a folder in diffusers' format; copies those of a bucket."""
  if path.name.isdigit() and path.parent.name == loading.FOLDER and path.is_dir():
    raise SettingError(
      "path",
      init.path,
      f"is a checkpoint of a run: use config.init.path={path.parent.parent} and "
      f"config.init.step={path.name}",
    )
  if not isinstance(path, Path) and path.exists():
    with bucket_weights.local_weights(path) as local:
      return _open_file(local, init, target)
  for name in ("step", "ema_decay"):
    if getattr(init, name) is not None:
      raise SettingError(name, getattr(init, name), "is for workdirs, not for a file")
  if not isinstance(path, Path) or not os.path.exists(path):
    raise SettingError(
      "path", init.path, "must be a workdir with checkpoints, or a file of weights"
    )
  known: torch_mdt.KnownSizes = {"num_classes": init.num_classes}
  try:
    opened = _open_as(path, init.network, known, target)
  except SettingError as error:
    if error.accepted == torch_sprint.NEEDS_SIZE:  # the parameters fit any size
      known["input_size"] = max(target.input_shape[:2])
      opened = _open_as(path, init.network, known, target)
    elif error.setting == "input_size":  # no setting of `config.init`
      text = f"{CONFIG_FILE} beside it states sample_size = {error.value}, which "
      text += error.accepted
      if error.value is None:
        text = f"needs a {CONFIG_FILE} beside it that states sample_size, because it "
        text += "holds no position embedding"
      raise SettingError("path", str(path), text) from None
    else:
      raise
  file = diffusers_dit.find_file(path)
  model = create_model(**opened.attributes)
  return Weights(
    model,
    converted.settings_of(opened.attributes, opened.metadata),
    opened.read,
    None,
    checksums.checksum_of(file),
    hub_folders.read_labels(file, model.num_classes),
  )


def _open_as(
  path: Path, network: str | None, known: torch_mdt.KnownSizes, target: Model
) -> torch_mdt.OpenCheckpoint:
  """Opens a file; heads that it does not state are those of the network to train."""
  while True:
    try:
      return torch_mdt.open_checkpoint(path, network, **known)
    except SettingError as error:
      name = error.setting
      if name not in _HEADS or name in known:
        raise
      heads = getattr(target, name, None)
      if heads is None:
        raise
      known[name] = heads
