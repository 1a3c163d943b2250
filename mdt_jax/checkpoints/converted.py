"""Converts checkpoints of the released PyTorch code to workdirs and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax

from mdt_jax import recipes
from mdt_jax.checkpoints import loading, manager
from mdt_jax.config import write_config
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.pretrained import torch_mdt
from mdt_jax.pretrained.tensors import check_suffix, write_tensors
from mdt_jax.settings import Settings


def from_torch_file(
  path: str | Path,
  workdir: str | Path,
  network: str | None = None,
  *,
  overwrite: bool = False,
  decode_depth: int | None = None,
  num_heads: int | None = None,
) -> Settings:
  """Converts a released PyTorch checkpoint to a workdir for sampling and evaluation.

  Args:
    path: file of the checkpoint; see `torch_mdt.from_torch`.
    workdir: an empty folder, or the path of a new folder.
    network: name of the network; see `torch_mdt.from_torch`.
    overwrite: whether to replace the checkpoints in `workdir`.
    decode_depth, num_heads: see `torch_mdt.from_torch`.

  Returns:
    Settings of a run with this network, as saved in the workdir.

  Raises:
    SettingError: see `torch_mdt.from_torch`; or `workdir` is a file; or `workdir` is
      not empty and `overwrite` is False. Nothing is written then.
  """
  workdir = Path(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise SettingError("workdir", str(workdir), "must be a folder, not a file")
  if workdir.is_dir() and any(workdir.iterdir()) and not overwrite:
    raise SettingError(
      "workdir", str(workdir), "must be an empty folder unless overwrite is set"
    )
  attributes, params = torch_mdt.from_torch(
    path, network, decode_depth=decode_depth, num_heads=num_heads
  )
  settings = recipes.of_network(attributes)
  # The old checkpoints are removed only after the new one is complete.
  partial = workdir.with_name(f".{workdir.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    loading.save_model(partial, settings, params)
    write_config(settings, partial)
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(workdir / manager.FOLDER, ignore_errors=True)
    for entry in partial.iterdir():
      entry.replace(workdir / entry.name)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return settings


def to_torch_file(
  workdir: str | Path,
  path: str | Path,
  *,
  overwrite: bool = False,
  step: int | None = None,
  ema_decay: float | None = None,
) -> int:
  """Writes averaged parameters to a file that the released PyTorch code loads.

  Args:
    workdir: folder of a run, or of `from_torch_file`.
    path: file to write, with suffix .pt, .pth or .safetensors.
    overwrite: whether to replace an existing file.
    step: step of the checkpoint; None for the latest.
    ema_decay: decay of the average; see `loading.load_ema`.

  Returns:
    The step of the checkpoint.

  Raises:
    SettingError: see `loading.load_ema` and `torch_mdt.to_torch`; or `path` has another
      suffix; or `path` exists and `overwrite` is False. Nothing is written then.
  """
  path = Path(path)
  check_suffix("path", path)
  if path.exists() and not overwrite:
    raise SettingError("path", str(path), "exists already, and overwrite is not set")
  with renamed_in_errors({"path": "workdir"}):
    checkpoint = loading.load_ema(workdir, step, ema_decay)
  model = checkpoint.experiment.model
  attributes = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ("parent", "name")
  }
  tensors = torch_mdt.to_torch(attributes, jax.device_get(checkpoint.params))
  write_tensors(path, tensors)
  return checkpoint.step
