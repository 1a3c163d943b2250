"""Files of named tensors, read and written, and whether they are those of a network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.errors import SettingError

Tensors = dict[str, np.ndarray]

MAX_NAMES = 5  # tensors named in an error


def read_tensors(path: str | Path) -> Tensors:
  """Named arrays of a .pt, .pth, .bin or .safetensors file; no code in it is run."""
  path = Path(path)
  if not path.is_file():
    raise SettingError("--input", str(path), "must be a file")
  if path.suffix == ".safetensors":
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
      return load_file(path)
    except (SafetensorError, OSError) as error:
      raise SettingError(
        "--input", str(path), f"no safetensors file: {error}"
      ) from None
  if path.suffix != ".bin":  # as diffusers names what torch.save writes
    check_suffix("--input", path)
  torch = _import_torch("--input", path)
  try:
    # Checkpoints of DiT's training hold their command line, as a plain Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many kinds for a file that is none
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise SettingError(
      "--input", str(path), f"no checkpoint that is safe to load: {reason}"
    ) from None
  if isinstance(loaded, Mapping) and isinstance(loaded.get("ema"), Mapping):
    loaded = loaded["ema"]
  if not isinstance(loaded, Mapping) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_sparse
    for name, value in loaded.items()
  ):
    raise SettingError("--input", str(path), "must hold a dict of named tensors")
  # NumPy has no bfloat16; parameters are float32 here in any case.
  return {
    name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    for name, tensor in loaded.items()
  }


def check_suffix(setting: str, path: Path) -> None:
  """Raises SettingError for a file of a kind that is neither read nor written."""
  if path.suffix not in (".pt", ".pth", ".safetensors"):
    raise SettingError(setting, str(path), "must end in .pt, .pth or .safetensors")


def write_tensors(path: str | Path, tensors: Tensors) -> None:
  """Writes named arrays to a .pt, .pth or .safetensors file, whole or not at all."""
  path = Path(path)
  check_suffix("--output", path)
  with atomic_write(path) as partial:
    if path.suffix == ".safetensors":
      from safetensors.numpy import save_file

      save_file(tensors, partial)
    else:
      torch = _import_torch("--output", path)
      named = {name: torch.from_numpy(array) for name, array in tensors.items()}
      torch.save(named, partial)


def misfits(
  tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """What keeps tensors from being those of a network: its names and shapes."""
  problems = [f"{name} is missing" for name in shapes if name not in tensors]
  problems += [f"{name} is not part of it" for name in tensors if name not in shapes]
  problems += [
    f"{name} has shape {tuple(tensors[name].shape)} where {shape} is expected"
    for name, shape in shapes.items()
    if name in tensors and tuple(tensors[name].shape) != shape
  ]
  return problems


def refuse(setting: str, source: Any, taken_for: str, problems: Sequence[str]) -> None:
  """Raises SettingError that names the first `problems`, where there are any."""
  if problems:
    more = len(problems) - MAX_NAMES
    named = "; ".join(problems[:MAX_NAMES]) + (f"; and {more} more" if more > 0 else "")
    raise SettingError(setting, str(source), f"{taken_for}: {named}")


def _import_torch(setting: str, path: Path) -> Any:
  try:
    import torch
  except ImportError:
    raise SettingError(
      setting, str(path), "needs PyTorch: pip install -e '.[torch]'"
    ) from None
  return torch
