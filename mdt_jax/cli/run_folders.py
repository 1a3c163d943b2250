"""Paths inside a run's folder, given where the folder itself is meant."""

from __future__ import annotations

import os
from pathlib import Path

from etils import epath

from mdt_jax.buckets import AnyPath, is_bucket
from mdt_jax.errors import SettingError
from mdt_jax.paths import absolute, any_path

_FOLDER = "checkpoints"  # as `mdt_jax.checkpoints.manager.FOLDER`, which imports JAX


def is_run(path: str | os.PathLike[str]) -> bool:
  """Whether a folder holds checkpoints of a run."""
  return _holds_steps(absolute(path) / _FOLDER)


def check_run_folder(
  flag: str, value: str, step_flag: str | None = None, *, accepts_parent: bool = False
) -> None:
  """Refuses the path of a checkpoint where a command expects the folder of its run.

  Args:
    flag: the flag's name, such as "checkpoint".
    value: its value.
    step_flag: flag that chooses a step, if the command has one.
    accepts_parent: whether the command also takes the folder "checkpoints" of a run.

  Raises:
    SettingError: `value` lies in the folder "checkpoints" of a run.
  """
  path = absolute(any_path(f"--{flag}", value))
  if path.is_file() or is_run(path):
    return
  for folder in (path, *path.parents):
    if folder.name != _FOLDER or not _holds_steps(folder):
      continue
    inside = path.relative_to(folder).parts
    if not inside and accepts_parent:
      return
    hint = f"--{flag}={_as_typed(value, len(inside) + 1)}"
    if inside and inside[0].isdigit() and step_flag is not None:
      hint += f" --{step_flag}={inside[0]}"
    what = (
      f"lies in the folder {_FOLDER!r} of a run" if inside else "is no run's folder"
    )
    raise SettingError(f"--{flag}", value, f"{what}; did you mean {hint}?")


def _holds_steps(folder: AnyPath) -> bool:
  """Whether a folder holds checkpoints, and not only folders with a number as name."""
  steps = [e for e in folder.iterdir() if e.name.isdigit()] if folder.is_dir() else []
  return any((s / "checksums.json").exists() or (s / "ema").exists() for s in steps)


def _as_typed(value: str, levels: int) -> str:
  """The path so many folders above, relative if `value` is."""
  path = epath.Path(value) if is_bucket(value) else Path(value)
  for _ in range(levels):
    path = path.parent if path.name not in ("", "..") else path / ".."
  return str(path)
