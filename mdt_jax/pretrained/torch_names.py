"""Names of tensors as training frameworks write them, reduced to the released names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mdt_jax.errors import SettingError
from mdt_jax.logs import counted
from mdt_jax.pretrained.tensors import Tensors

# Parts that wrappers of modules put anywhere in a name: torch.compile, FSDP, and
# activation checkpoints.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Parts before a whole network, the preferred one first: averaged parameters,
# attributes of a training class, DistributedDataParallel.
_PREFIXES = ("ema", "model", "module")
_MAX_SHOWN = 5  # names in an error


def without_prefixes(
  tensors: Mapping[str, np.ndarray], setting: str, source: str
) -> Tensors:
  """Removes the parts of names that wrappers of a network add.

  "module._orig_mod.blocks.0.mlp.fc1.bias" becomes "blocks.0.mlp.fc1.bias". If the file
  holds "ema.…" and "model.…", the tensors of "model.…" are left out.

  Args:
    tensors: name -> array.
    setting: setting that errors name.
    source: name of the file in errors.

  Raises:
    SettingError: two names become equal.
  """
  names = {
    name: ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for name in tensors
  }
  while names:
    first = {name.partition(".")[0] for name in names.values()}
    if not first <= set(_PREFIXES):
      break
    kept = next(prefix for prefix in _PREFIXES if prefix in first)
    if len(first) > 1 and kept != "ema":
      break
    names = {
      old: new.partition(".")[2]
      for old, new in names.items()
      if new.startswith(f"{kept}.")
    }
  found: dict[str, str] = {}
  for old, new in names.items():
    if new in found:
      raise SettingError(
        setting, source, f"holds {new} twice, as {found[new]} and as {old}"
      )
    found[new] = old
  return {new: tensors[old] for new, old in found.items()}


def some_names(tensors: Mapping[str, np.ndarray]) -> str:
  """Describes, for errors, which tensors a file holds."""
  if not tensors:
    return "it holds no tensors"
  names = ", ".join(name[:80] for name in list(tensors)[:_MAX_SHOWN])
  return f"it holds {counted(len(tensors), 'tensor')}, such as {names}"
