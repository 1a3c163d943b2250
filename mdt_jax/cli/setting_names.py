"""Names of settings, to suggest one for a name that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import Any

from mdt_jax.typed_config import kind_of, setting_types

# Names that other programs use -> names of ours, in order of preference.
SYNONYMS = {
  "batch": ["batch_size", "batch_per_device"],
  "bs": ["batch_size", "batch_per_device"],
  "cfg": ["cfg_scale"],
  "checkpoint": ["workdir", "input"],
  "checkpoint_dir": ["checkpoint", "workdir"],
  "ckpt": ["checkpoint", "workdir", "input"],
  "classes": ["labels"],
  "dir": ["workdir", "output"],
  "ema": ["ema_decays", "ema_decay"],
  "epochs": ["num_steps"],
  "guidance": ["cfg_scale"],
  "guidance_scale": ["cfg_scale"],
  "image_size": ["input_size"],
  "logdir": ["workdir"],
  "lr": ["learning_rate"],
  "max_steps": ["num_steps"],
  "model": ["checkpoint"],
  "model_path": ["checkpoint"],
  "num_samples": ["num_images"],
  "num_sampling_steps": ["num_steps"],
  "out": ["output", "workdir"],
  "output": ["workdir"],
  "output_dir": ["output", "workdir"],
  "resolution": ["image_size", "input_size"],
  "sampler": ["method"],
  "steps": ["num_steps"],
  "train_steps": ["num_steps"],
  "wd": ["weight_decay"],
  "workdir": ["checkpoint", "input", "output"],
}


@functools.cache
def all_settings() -> dict[str, Any]:
  """Returns the annotation of every setting and group, by its name below config."""
  from mdt_jax.settings import Settings  # imports JAX

  return setting_types(Settings)


def is_own_argument(path: str) -> bool:
  """Whether a name lies in a dict, such as optimizer.arguments.momentum."""
  dicts = [n for n, accepted in all_settings().items() if kind_of(accepted)[0] is dict]
  return any(path.startswith(f"{name}.") for name in dicts)


def near_settings(path: str) -> list[str]:
  """Returns flags of settings whose names resemble `path`, the best first.

  Args:
    path: name of a setting, such as "model.hiden_size" or "lr".
  """
  settings = all_settings()
  group, _, leaf = path.rpartition(".")
  if path in settings:
    return _as_flags([path])
  for wanted in (leaf, *SYNONYMS.get(leaf, [])):
    if found := _settings_named(wanted):
      in_group = [name for name in found if name.startswith(f"{group}.")]
      return _as_flags(in_group or found)
  near = difflib.get_close_matches(path, settings, 1, cutoff=0.8)
  if near and ("." in path or len(_settings_named(near[0])) == 1):
    return _as_flags(near)
  leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in settings))
  near = difflib.get_close_matches(leaf, leaves, 1, cutoff=0.8)
  return _as_flags(_settings_named(near[0])) if near else []


def _settings_named(leaf: str) -> list[str]:
  """Settings of this name in any group, those outside of a group first."""
  found = [n for n in all_settings() if n == leaf or n.endswith(f".{leaf}")]
  return sorted(found, key=lambda name: name.count("."))


def _as_flags(names: Sequence[str]) -> list[str]:
  """--config.NAME for each name; for a group, its first setting."""
  settings = all_settings()
  flags = []
  for name in names:
    if dataclasses.is_dataclass(settings[name]):
      name = next(inner for inner in settings if inner.startswith(f"{name}."))
    flags.append(f"--config.{name}")
  return flags
