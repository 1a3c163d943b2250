"""Reads, writes and checks named tensors, and flattens trees of parameters."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from flax import traverse_util

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath, bucket_path, is_bucket
from mdt_jax.errors import SettingError, one_line
from mdt_jax.pretrained.torch_files import (
  NOTES,
  import_torch,
  read_torch_file,
)
from mdt_jax.types import Array, Params

Tensors: TypeAlias = dict[str, np.ndarray]

# Types of .safetensors files that NumPy has. `safetensors` reads or refuses others.
_DTYPES = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "I64": np.dtype("<i8"),
  "I32": np.dtype("<i4"),
}
MAX_NAMES = 5  # largest number of tensors named in an error
MAX_NAME = 200  # largest number of characters in the name of a tensor


# Suffixes of files that can be read; diffusers calls files of torch.save .bin.
READABLE = (".pt", ".pth", ".bin", ".safetensors")


class WeightFile(NamedTuple):
  """The contents of a file of weights.

  Attributes:
    tensors: name -> array.
    metadata: what the file says about the tensors: training arguments of a torch file,
      the metadata of a .safetensors file, and notes of `write_tensors`. Values may have
      any type.
  """

  tensors: Tensors
  metadata: dict[str, Any]


def read_tensors(path: str | Path) -> Tensors:
  """Reads named tensors from a file, without running code in the file.

  Args:
    path: a .safetensors file, or a .pt, .pth or .bin file (needs torch). If a torch
      file holds a dict with one of the entries "ema", "model", "state_dict" or
      "module", that entry is read; the first of these that the file has.

  Returns:
    name -> array. Floats of torch files are converted to float32.

  Raises:
    SettingError: setting "path": the file does not exist, has another extension, is
      damaged, is larger than the memory, cannot be read safely, or holds anything but
      named tensors of finite real numbers.
  """
  return read_weight_file(path).tensors


def read_weight_file(path: str | Path) -> WeightFile:
  """Reads tensors as `read_tensors` does, and what the file says about them."""
  path = Path(path)
  check_file(path)
  if path.suffix == ".safetensors":
    tensors, metadata = _read_safetensors(path)
  else:
    check_suffix("path", path, READABLE)
    tensors, metadata = read_torch_file(path)
  for name, array in tensors.items():
    if not name.isprintable() or len(name) > MAX_NAME:
      raise SettingError("path", str(path), f"has a tensor named {name[:MAX_NAME]!r}")
    if np.iscomplexobj(array):
      raise SettingError("path", str(path), f"{name} must be real, is {array.dtype}")
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite
      finite = np.isfinite(array.astype(np.float32) if array.itemsize > 4 else array)
    if not finite.all():
      raise SettingError(
        "path", str(path), f"{name} holds numbers that are not finite (NaN or infinity)"
      )
  return WeightFile(tensors, metadata)


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
  """Reads the metadata of a .safetensors file, and maps its tensors into the memory."""
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="np") as file:  # checks all sizes and offsets
      header, start = _read_header(path)
      mapped = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b""
      tensors = {}
      for name in file.keys():  # noqa: SIM118
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
          tensors[name] = file.get_tensor(name)
          continue
        first, end = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(mapped[first:end], dtype).reshape(entry["shape"])
      return tensors, dict(file.metadata() or {})
  except SettingError:
    raise
  except (SafetensorError, OSError) as error:
    raise SettingError(
      "path", str(path), f"must be a safetensors file: {one_line(error)}"
    ) from None
  except Exception as error:  # a dtype without a NumPy type, such as F8_E4M3
    raise SettingError(
      "path",
      str(path),
      f"holds tensors of a dtype that NumPy lacks: {one_line(error)}",
    ) from None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
  """Returns the entries of a valid .safetensors file, and where its tensors start.

  Raises:
    SettingError: the header repeats a name.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name, earlier in zip(sorted(names), sorted(names)[1:], strict=False):
      if name == earlier:
        raise SettingError("path", str(path), f"has two tensors named {name!r}")
    return dict(pairs)

  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length), object_pairs_hook=unique), 8 + length


def check_file(path: Path) -> None:
  """Raises SettingError unless a path is a file that fits into the memory.

  A sparse file of any size takes no space on a disk, but fills the memory when read.
  """
  if not os.path.isfile(path):  # False for pipes, devices and names that are too long
    raise SettingError("path", str(path), "must be a file")
  size = path.stat().st_size
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if size > memory:
    raise SettingError(
      "path",
      str(path),
      f"has {size / 2**30:.0f} GiB; the memory of this machine is "
      f"{memory / 2**30:.0f} GiB",
    )


def check_suffix(
  setting: str, path: AnyPath, accepted: Sequence[str] = (".pt", ".pth", ".safetensors")
) -> None:
  """Raises SettingError unless `path` ends in one of the accepted suffixes."""
  if path.suffix not in accepted:
    names = f"{', '.join(accepted[:-1])} or {accepted[-1]}"
    raise SettingError(setting, str(path), f"must end in {names}")


def write_tensors(
  path: str | os.PathLike[str],
  tensors: Tensors,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes named tensors atomically to a .pt, .pth or .safetensors file.

  Args:
    path: path of the file, on a local disk or in a bucket (gs://…).
    tensors: name -> array.
    metadata: texts to store in the file, by name; `read_weight_file` returns them. A
      .pt file holds them as an attribute of the state dict, which PyTorch's
      `load_state_dict` ignores.

  Raises:
    SettingError: setting "path": the file has another extension, torch is needed and
      not installed, or torch cannot write the file.
    OSError: the file cannot be written.
  """
  file = bucket_path("path", path) if is_bucket(path) else Path(path)
  check_suffix("path", file)
  with atomic_write(file) as partial:
    if file.suffix == ".safetensors":
      from safetensors.numpy import save

      # save_file would hide the error of a full disk, and the file from other users.
      partial.write_bytes(save(tensors, dict(metadata or {}) or None))
    else:
      torch = import_torch("path", file)
      named = OrderedDict((n, torch.from_numpy(array)) for n, array in tensors.items())
      if metadata:
        setattr(named, NOTES, dict(metadata))
      try:
        torch.save(named, partial)
      except RuntimeError as error:  # a full disk
        accepted = f"cannot be written: {one_line(error)}"
        raise SettingError("path", str(path), accepted) from None


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


def refuse(setting: str, source: Any, read_as: str, problems: Sequence[str]) -> None:
  """Raises SettingError with the first MAX_NAMES of `problems`, if there are any.

  Args:
    setting: setting named in the error.
    source: value of the setting.
    read_as: what the tensors were read as; starts the message.
    problems: phrases of `misfits`.
  """
  if problems:
    more = len(problems) - MAX_NAMES
    named = "; ".join(problems[:MAX_NAMES]) + (f"; and {more} more" if more > 0 else "")
    raise SettingError(setting, str(source), f"{read_as}: {named}")


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
