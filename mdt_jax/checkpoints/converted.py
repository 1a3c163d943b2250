"""Files of the released PyTorch code to workdirs, and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories, recipes
from mdt_jax.checkpoints import manager
from mdt_jax.errors import SettingError
from mdt_jax.pretrained import torch_mdt
from mdt_jax.pretrained.tensors import check_suffix, write_tensors


def from_torch_file(
  path: str | Path, workdir: str | Path, *, overwrite: bool = False, **known: Any
) -> ConfigDict:
  """Makes a workdir, to sample from, of a released checkpoint.

  Args:
    path: see `torch_mdt.from_torch`.
    workdir: a folder that is empty or not there yet.
    overwrite: replace the checkpoints that it holds.
    **known: decode_depth and num_heads, as `torch_mdt.from_torch` takes them.

  Returns:
    The config of the run that the checkpoint is of.

  Raises:
    SettingError: before anything is written.
  """
  workdir = Path(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise SettingError("--output", str(workdir), "must be a folder, this is a file")
  if workdir.is_dir() and any(workdir.iterdir()) and not overwrite:
    raise SettingError(
      "--output", str(workdir), "must be empty, or --overwrite must be given"
    )
  attributes, params = torch_mdt.from_torch(path, **known)
  config = recipes.of_network(attributes)
  # What is there goes when what replaces it is whole.
  partial = workdir.with_name(f".{workdir.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    manager.save_model(partial, config, params)
    settings.write(config, partial)
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(workdir / manager.FOLDER, ignore_errors=True)
    for made in partial.iterdir():
      made.replace(workdir / made.name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return config


def to_torch_file(
  workdir: str | Path,
  path: str | Path,
  *,
  overwrite: bool = False,
  step: int | None = None,
  ema_decay: float | None = None,
) -> int:
  """Writes averaged parameters for the released PyTorch code.

  Args:
    workdir: of a run, or a converted one.
    path: a .pt, .pth or .safetensors file.
    overwrite: replace that file.
    step: of the checkpoint; None for the latest.
    ema_decay: which average; see `manager.load_ema`.

  Returns:
    The step.

  Raises:
    SettingError: before anything is written.
  """
  path = Path(path)
  check_suffix("--output", path)
  if path.exists() and not overwrite:
    raise SettingError("--output", str(path), "is there already: give --overwrite")
  try:
    config, params, step = manager.load_ema(workdir, step, ema_decay)
  except SettingError as error:
    if error.setting != "--checkpoint":
      raise
    raise SettingError("--input", error.value, error.accepted) from None
  attributes = dataclasses.asdict(factories.make_model(config))
  tensors = torch_mdt.to_torch(
    {k: v for k, v in attributes.items() if k not in ("parent", "name")},
    jax.device_get(params),
  )
  write_tensors(path, tensors)
  return step
