"""Folders in diffusers' format: config.json beside a file of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mdt_jax.errors import SettingError

CONFIG_FILE = "config.json"
# Accepted names, the preferred one first.
WEIGHT_FILES = (
  "diffusion_pytorch_model.safetensors",
  "diffusion_pytorch_model.bin",
  "diffusion_pytorch_model.fp16.safetensors",
  "diffusion_pytorch_model.fp16.bin",
)
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
  if not os.path.isfile(path) or path.stat().st_size > _MAX_CONFIG:
    raise SettingError(
      setting, str(path), f"must be a JSON file of at most {_MAX_CONFIG} bytes"
    )
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise SettingError(setting, str(path), f"must be a JSON file: {error}") from None
  if not isinstance(config, dict):
    raise SettingError(setting, str(path), "must hold a dict of settings")
  return config
