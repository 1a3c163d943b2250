"""Files of the released PyTorch code to workdirs, and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

from mdt_jax import recipes
from mdt_jax.checkpoints import loading, manager
from mdt_jax.config import write_config
from mdt_jax.errors import SettingError
from mdt_jax.pretrained import torch_mdt
from mdt_jax.pretrained.tensors import check_suffix, write_tensors
from mdt_jax.settings import Settings


def from_torch_file(
  path: str | Path, workdir: str | Path, *, overwrite: bool = False, **known: Any
) -> Settings:
  """Converts a released checkpoint to a workdir that can be sampled from.

  Args:
    path: see `torch_mdt.from_torch`.
    workdir: a folder that is empty or not there yet.
    overwrite: replace the checkpoints that it holds.
    **known: decode_depth and num_heads, as `torch_mdt.from_torch` takes them.

  Returns:
    The settings of the run that the checkpoint comes from.

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
  settings = recipes.of_network(attributes)
  # The old checkpoints are removed once the new one is complete.
  partial = workdir.with_name(f".{workdir.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    loading.save_model(partial, settings, params)
    write_config(settings, partial)
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(workdir / manager.FOLDER, ignore_errors=True)
    for made in partial.iterdir():
      made.replace(workdir / made.name)
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
    checkpoint = loading.load_ema(workdir, step, ema_decay)
  except SettingError as error:
    if error.setting != "--checkpoint":
      raise
    raise SettingError("--input", error.value, error.accepted) from None
  attributes = dataclasses.asdict(checkpoint.experiment.model)
  tensors = torch_mdt.to_torch(
    {k: v for k, v in attributes.items() if k not in ("parent", "name", "condition")},
    jax.device_get(checkpoint.params),
  )
  write_tensors(path, tensors)
  return checkpoint.step
