"""Reads files of torch.save (.pt, .pth, .bin) without running code in them.

`torch.load(weights_only=True)` runs no code, but it believes the sizes that a file
declares. So this module checks the sizes first: a file of a kilobyte must not fill the
memory.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mdt_jax.buckets import AnyPath
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger
from mdt_jax.pretrained.pickles import check_pickle

# Entries of a training checkpoint that hold a network, the preferred one first.
# DiT saves "ema" (averaged parameters) and "model"; Lightning saves "state_dict".
ENTRIES = ("ema", "model", "state_dict", "module")
# Attribute of a state dict in which PyTorch keeps notes; `load_state_dict` ignores
# notes of unknown names.
NOTES = "_metadata"
_MAX_DEPTH = 3  # of entries inside entries
# A file of the format before torch 1.6 starts with these: a magic number, a version,
# the system, what was saved, and the names of the storages.
_LEGACY_PICKLES = 5
_MAX_PICKLE = 2**26  # bytes; that of DiT-XL/2 with its optimizer has 1 MB
_MAX_SHARING = 2  # how often the bytes of a file may be used, for tied tensors
_DAMAGES = (
  zipfile.BadZipFile,
  zlib.error,
  EOFError,
  OSError,
  NotImplementedError,  # an unknown method of compression
  RuntimeError,  # an encrypted entry
  ValueError,  # an impossible offset or date
)


def import_torch(setting: str, path: AnyPath) -> Any:
  """Imports torch; raises SettingError if torch is not installed."""
  try:
    import torch
  except ImportError:
    raise SettingError(
      setting, str(path), "needs PyTorch: pip install -e '.[torch]'"
    ) from None
  return torch


def read_torch_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Reads the named tensors of a file of torch.save.

  Args:
    path: path of the file, which exists.

  Returns:
    (tensors, metadata): name -> array, floats in float32; and the training arguments
    ("args") and notes that the file holds.

  Raises:
    SettingError: setting "path": the file is damaged, cannot be read safely, or holds
      anything but named dense tensors.
  """
  torch = import_torch("path", path)
  is_zip = _is_zip(path)
  if is_zip:
    _check_zip(path)
  else:
    with path.open("rb") as file:
      start = _start(file)
    for _ in range(_LEGACY_PICKLES):
      _check_pickle(path, start)
      if start.tell() == len(start.getbuffer()):
        break  # no such file; torch.load says why
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      # Checkpoints of DiT's training code hold an argparse.Namespace.
      with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
  except Exception as error:  # torch raises many types for broken files
    raise _unsafe(path, _reason(error)) from None
  named, entry = _named_tensors(loaded, torch)
  if named is None:
    raise SettingError(
      "path",
      str(path),
      "must hold a dict of named tensors, itself or under one of "
      f"{', '.join(ENTRIES)}; {_describe(loaded)}",
    )
  if entry:
    logger.info("%s: reading its entry %r", path, entry)
  _check_tensors(path, named, torch)
  try:
    # NumPy has no bfloat16, and parameters are float32 in this package.
    arrays = {
      name: (tensor.float() if tensor.is_floating_point() else tensor)
      .detach()
      .resolve_neg()
      .resolve_conj()
      .numpy()
      for name, tensor in named.items()
    }
  except (RuntimeError, TypeError) as error:
    raise _unsafe(path, _reason(error)) from None
  return arrays, _metadata(loaded, named)


def _is_zip(path: Path) -> bool:
  """Whether a file is a zip file, as torch.save writes since torch 1.6."""
  try:
    return zipfile.is_zipfile(path)
  except _DAMAGES as error:
    raise SettingError("path", str(path), f"is damaged: {one_line(error)}") from None


def _check_zip(path: Path) -> None:
  """Checks sizes, pickles and CRC-32 checksums of a zip file of torch.save."""
  try:
    with zipfile.ZipFile(path) as file:
      entries = file.infolist()
      for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
          raise SettingError(
            "path",
            str(path),
            f"{entry.filename!r} is compressed, which torch.save never does",
          )
      declared, size = sum(e.file_size for e in entries), path.stat().st_size
      if declared > size:
        raise SettingError(
          "path", str(path), f"is damaged: declares {declared} bytes, has {size}"
        )
      for entry in entries:
        # torch looks up this name without regard to case.
        if entry.filename.lower().endswith("/data.pkl"):
          with file.open(entry) as stream:
            _check_pickle(path, _start(stream))
      damaged = file.testzip()
  except SettingError:
    raise
  except _DAMAGES as error:
    raise SettingError("path", str(path), f"is damaged: {one_line(error)}") from None
  if damaged is not None:
    raise SettingError(
      "path", str(path), f"is damaged: {damaged!r} differs from its CRC"
    )


def _start(stream: IO[bytes]) -> io.BytesIO:
  """Reads the first _MAX_PICKLE bytes, in which a pickle must end."""
  return io.BytesIO(stream.read(_MAX_PICKLE))


def _check_pickle(path: Path, start: io.BytesIO) -> None:
  """Refuses a pickle that is broken, too large, or asks for unlimited memory or time.

  Args:
    path: path of the file, for errors.
    start: result of `_start`; is at the end of the pickle afterwards.
  """
  try:
    with warnings.catch_warnings():  # of escape sequences in texts
      warnings.simplefilter("ignore")
      check_pickle(start)
  except ValueError as error:
    if start.tell() == len(start.getbuffer()) == _MAX_PICKLE:
      raise SettingError(
        "path", str(path), f"holds a pickle of more than {_MAX_PICKLE:,} bytes"
      ) from None
    raise _unsafe(path, one_line(error)) from None


def _named_tensors(loaded: Any, torch: Any) -> tuple[Mapping[str, Any] | None, str]:
  """Finds the dict of named tensors in what a file holds.

  Returns:
    (tensors, entry): the dict, or None if there is none; and the path of its entry,
    such as "ema", or "" for the whole file.
  """
  path = []
  for _ in range(_MAX_DEPTH):
    if not isinstance(loaded, Mapping):
      break
    held = [
      entry
      for entry in ENTRIES
      if isinstance(loaded.get(entry), Mapping) and loaded[entry]
    ]
    if not held:
      tensors = all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in loaded.items()
      )
      return (loaded, ".".join(path)) if tensors else (None, "")
    path.append(held[0])
    loaded = loaded[held[0]]
  return None, ""


def _check_tensors(path: Path, tensors: Mapping[str, Any], torch: Any) -> None:
  """Raises SettingError unless all tensors are dense, of accepted types and sizes."""
  for name, tensor in tensors.items():
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
      raise SettingError(
        "path", str(path), f"{name} must be a dense tensor with values, not quantised"
      )
    if tensor.is_floating_point() and tensor.element_size() < 2:
      raise SettingError(
        "path",
        str(path),
        f"{name} has the dtype {tensor.dtype}, which is not supported",
      )
  # A tensor of stride 0 repeats its values: it can be larger than its file.
  used = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
  size = os.path.getsize(path)
  if used > _MAX_SHARING * size:
    raise SettingError(
      "path", str(path), f"holds tensors of {used} bytes in a file of {size} bytes"
    )


def _metadata(loaded: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the training arguments and the notes of a file, by name."""
  metadata: dict[str, Any] = {}
  if isinstance(loaded, Mapping) and loaded is not tensors:
    args = loaded.get("args")
    metadata |= vars(args) if isinstance(args, argparse.Namespace) else {}
    metadata |= args if isinstance(args, Mapping) else {}
  notes = getattr(tensors, NOTES, None)
  return metadata | (dict(notes) if isinstance(notes, Mapping) else {})


def _describe(loaded: Any) -> str:
  """Describes what a file holds instead of tensors, for an error."""
  if not isinstance(loaded, Mapping):
    return f"it holds a {type(loaded).__name__}"
  names = [_printable(str(name)[:40]) for name in list(loaded)[:5]]
  return f"it holds {len(loaded)} entries: {', '.join(names)}"


def _unsafe(path: Path, reason: str) -> SettingError:
  return SettingError(
    "path", str(path), f"must be a whole checkpoint that is safe to load: {reason}"
  )


def _reason(error: Exception) -> str:
  """Returns the cause of an error of torch in a few words."""
  if found := re.search(r"GLOBAL (\S+)", str(error)):
    return f"it holds the Python object {_printable(found[1][:80])}"
  if found := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
    return _printable(found[1][:200])
  return one_line(error)


def _printable(text: str) -> str:
  """Returns a text without control characters, which a terminal would obey."""
  return "".join(c if c.isprintable() else "?" for c in text)
