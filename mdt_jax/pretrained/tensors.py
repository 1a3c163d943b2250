"""Named tensors: reading and writing files, checking names and shapes, flat trees."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flax import traverse_util

from mdt_jax.atomic import atomic_write
from mdt_jax.errors import SettingError
from mdt_jax.types import Array, Params

Tensors: TypeAlias = dict[str, np.ndarray]

MAX_NAMES = 5  # tensors named in an error


def read_tensors(path: str | Path) -> Tensors:
  """Reads named arrays from a file. Code in the file is not run.

  Args:
    path: a .pt, .pth, .bin (these need torch) or .safetensors file.

  Returns:
    name -> array; floats of torch's files are float32.

  Raises:
    SettingError: `path` is no file, cannot be read safely, or holds other things than
      named tensors.
  """
  path = Path(path)
  if not path.is_file():
    raise SettingError("path", str(path), "must be a file")
  if path.suffix == ".safetensors":
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
      return load_file(path)
    except (SafetensorError, OSError) as error:
      raise SettingError("path", str(path), f"no safetensors file: {error}") from None
  if path.suffix != ".bin":  # as diffusers names what torch.save writes
    check_suffix("path", path)
  torch = _import_torch("path", path)
  try:
    # Checkpoints of DiT's training hold their command line, as a plain Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many kinds for a file that is none
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise SettingError(
      "path", str(path), f"no checkpoint that is safe to load: {reason}"
    ) from None
  if isinstance(loaded, Mapping) and isinstance(loaded.get("ema"), Mapping):
    loaded = loaded["ema"]
  if not isinstance(loaded, Mapping) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor) and not value.is_sparse
    for name, value in loaded.items()
  ):
    raise SettingError("path", str(path), "must hold a dict of named tensors")
  # NumPy has no bfloat16; parameters are float32 here in any case.
  return {
    name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    for name, tensor in loaded.items()
  }


def check_suffix(setting: str, path: Path) -> None:
  """Raises SettingError unless the file is of a kind that can be read and written."""
  if path.suffix not in (".pt", ".pth", ".safetensors"):
    raise SettingError(setting, str(path), "must end in .pt, .pth or .safetensors")


def write_tensors(path: str | Path, tensors: Tensors) -> None:
  """Writes named arrays to a .pt, .pth or .safetensors file, whole or not at all.

  Raises:
    SettingError: the file's name ends otherwise, or torch is needed and not installed.
  """
  path = Path(path)
  check_suffix("path", path)
  with atomic_write(path) as partial:
    if path.suffix == ".safetensors":
      from safetensors.numpy import save_file

      save_file(tensors, partial)
    else:
      torch = _import_torch("path", path)
      named = {name: torch.from_numpy(array) for name, array in tensors.items()}
      torch.save(named, partial)


def misfits(
  tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Describes the tensors that are missing, left over or of another shape.

  Args:
    tensors: name -> array.
    shapes: name -> shape, of all tensors of a network.
  """
  problems = [f"{name} is missing" for name in shapes if name not in tensors]
  problems += [f"{name} is not part of it" for name in tensors if name not in shapes]
  problems += [
    f"{name} has shape {tuple(tensors[name].shape)} where {shape} is expected"
    for name, shape in shapes.items()
    if name in tensors and tuple(tensors[name].shape) != shape
  ]
  return problems


def refuse(setting: str, source: Any, taken_for: str, problems: Sequence[str]) -> None:
  """Raises SettingError with the first few of `problems`, if there are any."""
  if problems:
    more = len(problems) - MAX_NAMES
    named = "; ".join(problems[:MAX_NAMES]) + (f"; and {more} more" if more > 0 else "")
    raise SettingError(setting, str(source), f"{taken_for}: {named}")


def flatten(tree: Params, separator: str = "/") -> dict[str, Array]:
  """Returns path -> leaf of nested dicts, such as "final_layer/linear/kernel".

  Args:
    tree: arrays, or their shapes and types, in nested dicts.
    separator: between the keys of a path.
  """
  # The type that flax gives the leaves is that of an empty dict.
  leaves: Any = traverse_util.flatten_dict(tree, sep=separator)
  return leaves


def unflatten(leaves: Mapping[str, Any], separator: str = "/") -> Params:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(leaves), sep=separator)


def _import_torch(setting: str, path: Path) -> Any:
  try:
    import torch
  except ImportError:
    raise SettingError(
      setting, str(path), "needs PyTorch: pip install -e '.[torch]'"
    ) from None
  return torch
