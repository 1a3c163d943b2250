"""Files of the Hugging Face hub, by addresses such as hf://ORG/NAME/model.safetensors.

huggingface_hub downloads them into its own cache. With HF_HUB_OFFLINE=1 it reads the
cache alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mdt_jax.errors import SettingError, one_line
from mdt_jax.pretrained.diffusers_folders import CONFIG_FILE, WEIGHT_FILES

# Weights that mdt_jax.convert uploads. A repository may hold those of diffusers.
WEIGHTS = "model.safetensors"
_URL = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
SCHEME = "hf://"


def is_hub_url(path: str) -> bool:
  """Whether a path is an address of the hub."""
  return path.startswith(SCHEME)


def download(setting: str, url: str) -> Path:
  """Downloads a file, or the weights of a repository, and returns the local path.

  Args:
    setting: name of the setting in errors.
    url: hf://ORG/NAME/FILE; or hf://ORG/NAME for the weights of the repository
      (WEIGHTS, or one of `diffusers_folders.WEIGHT_FILES`) and its config.json.

  Returns:
    Path of the file of weights; config.json lies beside it if the repository has one.

  Raises:
    SettingError: the address is none, huggingface_hub is missing, or the hub refuses.
  """
  found = _URL.fullmatch(url)
  if found is None:
    raise SettingError(setting, url, "must be hf://ORG/NAME or hf://ORG/NAME/FILE")
  repository, name = found.groups()
  library: Any = import_hub(setting, url)
  try:
    if name is not None:
      return Path(library.hf_hub_download(repository, name))
    for weights in (WEIGHTS, *WEIGHT_FILES):
      folder = library.snapshot_download(
        repository, allow_patterns=[CONFIG_FILE, weights]
      )
      if (file := Path(folder) / weights).is_file():
        return file
  except Exception as error:  # network, access rights, unknown name, no such file
    raise SettingError(
      setting, url, f"cannot be read from the hub: {one_line(error)}"
    ) from None
  raise SettingError(
    setting, url, f"holds neither {WEIGHTS} nor {WEIGHT_FILES[0]}; name its file"
  )


def import_hub(setting: str, value: str) -> Any:
  """Imports huggingface_hub; raises SettingError if it is not installed."""
  try:
    import huggingface_hub  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise SettingError(
      setting, value, "needs huggingface_hub: pip install -e '.[hub]'"
    ) from None
  return huggingface_hub
