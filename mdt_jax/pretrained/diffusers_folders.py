"""Folders in diffusers' format: config.json beside a file of weights.

mdt_jax.convert writes such folders too, with weights of another name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mdt_jax.atomic import read_json
from mdt_jax.errors import SettingError

CONFIG_FILE = "config.json"
# Accepted names, the preferred one first.
WEIGHT_FILES = (
  "diffusion_pytorch_model.safetensors",
  "diffusion_pytorch_model.bin",
  "diffusion_pytorch_model.fp16.safetensors",
  "diffusion_pytorch_model.fp16.bin",
)
# Weights under the released names, as mdt_jax.convert uploads them.
RELEASED_WEIGHTS = "model.safetensors"
_MAX_CONFIG = 2**20  # bytes


def weights_in(folder: Path) -> Path | None:
  """Returns the file of weights in a folder; None if there is none."""
  paths = (folder / name for name in WEIGHT_FILES)
  return next((path for path in paths if os.path.isfile(path)), None)


def read_config(path: Path, setting: str) -> dict[str, Any]:
  """Reads a config.json.

  Args:
    path: path of the file.
    setting: setting that errors name.

  Raises:
    SettingError: the file cannot be read, or holds anything but a dict.
  """

  def refuse(text: str) -> SettingError:
    return SettingError(setting, str(path), text)

  try:
    return read_json(path, refuse, _MAX_CONFIG)
  except FileNotFoundError:
    raise refuse("must be a JSON file; there is no such file") from None
