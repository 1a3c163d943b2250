"""Reads, writes and checks named tensors, and flattens trees of parameters."""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flax import traverse_util

from mdt_jax.atomic import atomic_write
from mdt_jax.errors import SettingError
from mdt_jax.types import Array, Params

Tensors: TypeAlias = dict[str, np.ndarray]

MAX_NAMES = 5  # largest number of tensors named in an error


def read_tensors(path: str | Path) -> Tensors:
  """Reads named tensors from a file, without running code in the file.

  Args:
    path: a .safetensors file, or a .pt, .pth or .bin file (needs torch). If a torch
      file holds a dict with the entry "ema", that entry is read.

  Returns:
    name -> array. Floats of torch files are converted to float32.

  Raises:
    SettingError: setting "path": the file does not exist, has another extension, is
      damaged, cannot be read safely, or holds anything but named tensors of finite real
      numbers.
  """
  tensors = _read(Path(path))
  for name, array in tensors.items():
    if np.iscomplexobj(array):
      raise SettingError("path", str(path), f"{name} must be real, is {array.dtype}")
    if not np.isfinite(array).all():
      raise SettingError(
        "path", str(path), f"{name} holds numbers that are not finite (NaN or infinity)"
      )
  return tensors


def _read(path: Path) -> Tensors:
  """Reads the tensors of a file; see `read_tensors`."""
  if not path.is_file():
    raise SettingError("path", str(path), "must be a file")
  if path.suffix == ".safetensors":
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
      return load_file(path)
    except (SafetensorError, OSError) as error:
      raise SettingError(
        "path", str(path), f"must be a safetensors file: {error}"
      ) from None
    except Exception as error:  # a dtype without a NumPy type, such as F8_E4M3
      raise SettingError(
        "path", str(path), f"holds tensors of a dtype that NumPy lacks: {error}"
      ) from None
  if path.suffix != ".bin":  # diffusers' extension for files of torch.save
    check_suffix("path", path)
  torch = _import_torch("path", path)
  _check_zip(path)
  try:
    # Checkpoints of DiT's training code hold an argparse.Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many types for broken files
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise SettingError(
      "path", str(path), f"must be a checkpoint that is safe to load: {reason}"
    ) from None
  if isinstance(loaded, Mapping) and isinstance(loaded.get("ema"), Mapping):
    loaded = loaded["ema"]
  if not isinstance(loaded, Mapping) or not all(
    isinstance(name, str) and isinstance(value, torch.Tensor)
    for name, value in loaded.items()
  ):
    raise SettingError("path", str(path), "must hold a dict of named tensors")
  for name, tensor in loaded.items():
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
      raise SettingError(
        "path", str(path), f"{name} must be a dense tensor with values, not quantised"
      )
  # NumPy has no bfloat16, and parameters are float32 in this package.
  return {
    name: (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    for name, tensor in loaded.items()
  }


def _check_zip(path: Path) -> None:
  """Compares a file of torch.save with its CRC-32 checksums, which torch does not."""
  if not zipfile.is_zipfile(path):
    return  # the format before torch 1.6, or a file that torch.load refuses
  try:
    with zipfile.ZipFile(path) as file:
      damaged = file.testzip()
  # zipfile raises NotImplementedError for an unknown method of compression.
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as e:
    raise SettingError("path", str(path), f"is damaged: {e}") from None
  if damaged is not None:
    raise SettingError("path", str(path), f"is damaged: {damaged} differs from its CRC")


def check_suffix(setting: str, path: Path) -> None:
  """Raises SettingError unless `path` ends in .pt, .pth or .safetensors."""
  if path.suffix not in (".pt", ".pth", ".safetensors"):
    raise SettingError(setting, str(path), "must end in .pt, .pth or .safetensors")


def write_tensors(path: str | Path, tensors: Tensors) -> None:
  """Writes named tensors atomically to a .pt, .pth or .safetensors file.

  Args:
    path: path of the file.
    tensors: name -> array.

  Raises:
    SettingError: setting "path": the file has another extension, or torch is needed and
      not installed.
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
  """Describes tensors that are missing, unexpected or of the wrong shape.

  Args:
    tensors: name -> array.
    shapes: name -> shape, for all tensors of a network.

  Returns:
    One phrase per tensor, such as "pos_embed is missing"; empty if all tensors fit.
  """
  problems = [f"{name} is missing" for name in shapes if name not in tensors]
  problems += [f"{name} is unexpected" for name in tensors if name not in shapes]
  problems += [
    f"{name} must have shape {shape}, has {tuple(tensors[name].shape)}"
    for name, shape in shapes.items()
    if name in tensors and tuple(tensors[name].shape) != shape
  ]
  return problems


def refuse(setting: str, source: Any, taken_for: str, problems: Sequence[str]) -> None:
  """Raises SettingError with the first MAX_NAMES of `problems`, if there are any.

  Args:
    setting: setting named in the error.
    source: value of the setting.
    taken_for: what the tensors were read as; starts the message.
    problems: phrases of `misfits`.
  """
  if problems:
    more = len(problems) - MAX_NAMES
    named = "; ".join(problems[:MAX_NAMES]) + (f"; and {more} more" if more > 0 else "")
    raise SettingError(setting, str(source), f"{taken_for}: {named}")


def flatten(tree: Params, separator: str = "/") -> dict[str, Array]:
  """Flattens nested dicts to path -> leaf.

  Args:
    tree: nested dicts of arrays, or of their shapes and dtypes.
    separator: separator of the keys in a path, as in "final_layer/linear/kernel".
  """
  # flax declares too narrow a return type.
  leaves: Any = traverse_util.flatten_dict(tree, sep=separator)
  return leaves


def unflatten(leaves: Mapping[str, Any], separator: str = "/") -> Params:
  """Inverts `flatten`."""
  return traverse_util.unflatten_dict(dict(leaves), sep=separator)


def _import_torch(setting: str, path: Path) -> Any:
  """Imports torch; raises SettingError if torch is not installed."""
  try:
    import torch
  except ImportError:
    raise SettingError(
      setting, str(path), "needs PyTorch: pip install -e '.[torch]'"
    ) from None
  return torch
