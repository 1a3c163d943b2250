"""Files of the Hugging Face hub, by addresses such as hf://ORG/NAME/model.safetensors.

huggingface_hub downloads them into its own cache. With HF_HUB_OFFLINE=1 it reads the
cache alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mdt_jax.errors import SettingError, one_line
from mdt_jax.pretrained.diffusers_dit import SUBFOLDER
from mdt_jax.pretrained.diffusers_folders import (
  CONFIG_FILE,
  RELEASED_WEIGHTS,
  WEIGHT_FILES,
)

_REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"
_URL = re.compile(rf"hf://({_REPOSITORY})(?:/(.+))?")
SCHEME = "hf://"


def is_hub_url(path: str) -> bool:
  """Whether a path is an address of the hub."""
  return path.startswith(SCHEME)


def is_repository(name: str) -> bool:
  """Whether a text has the form ORG/NAME of a repository."""
  return re.fullmatch(_REPOSITORY, name) is not None


def download(setting: str, url: str) -> Path:
  """Downloads a file, or the weights of a repository, and returns the local path.

  Args:
    setting: name of the setting in errors.
    url: hf://ORG/NAME/FILE; or hf://ORG/NAME for the weights of the repository
      (`RELEASED_WEIGHTS`, or one of `WEIGHT_FILES`, also in a folder `transformer`) and
      the config.json beside them.

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
      return _download_file(library, repository, name)
    for weights in (RELEASED_WEIGHTS, *WEIGHT_FILES):
      folders = [""] if weights == RELEASED_WEIGHTS else ["", f"{SUBFOLDER}/"]
      patterns = [f"{at}{file}" for at in folders for file in (CONFIG_FILE, weights)]
      snapshot = Path(library.snapshot_download(repository, allow_patterns=patterns))
      for at in folders:
        if (file := snapshot / f"{at}{weights}").is_file():
          return file
  except Exception as error:  # network, access rights, unknown name, no such file
    raise SettingError(
      setting, url, f"cannot be read from the hub: {one_line(error)}"
    ) from None
  raise SettingError(
    setting,
    url,
    f"holds neither {RELEASED_WEIGHTS} nor {WEIGHT_FILES[0]}; name its file",
  )


def _download_file(library: Any, repository: str, name: str) -> Path:
  """Downloads a file, and the config.json of its folder if there is one."""
  file = Path(library.hf_hub_download(repository, name))
  patterns = [f"{name.rpartition('/')[0]}/{CONFIG_FILE}".lstrip("/")]
  library.snapshot_download(repository, allow_patterns=patterns)
  return file


def check_upload(setting: str, repository: str) -> None:
  """Checks, without network, that files can be uploaded to a repository.

  Args:
    setting: name of the setting in errors.
    repository: ORG/NAME.

  Raises:
    SettingError: the hub has no such names, or huggingface_hub is missing.
  """
  if not is_repository(repository):
    raise SettingError(
      setting, repository, "must be ORG/NAME, of letters, digits, '-', '_' and '.'"
    )
  import_hub(setting, repository)
  from huggingface_hub.utils import validate_repo_id

  try:
    validate_repo_id(repository)
  except ValueError as error:
    raise SettingError(setting, repository, one_line(error)) from None


def upload(
  setting: str, repository: str, folder: Path, message: str, *, private: bool = False
) -> None:
  """Uploads the files of a folder; creates the repository if there is none.

  Args:
    setting: name of the setting in errors.
    repository: ORG/NAME; see `check_upload`.
    folder: the folder.
    message: title of the commit.
    private: whether a new repository is private. An existing one stays as it is.

  Raises:
    SettingError: see `check_upload`; or the hub cannot be reached or refuses.
  """
  check_upload(setting, repository)
  library: Any = import_hub(setting, repository)
  try:
    api = library.HfApi()
    api.create_repo(repository, private=private or None, exist_ok=True)
    api.upload_folder(
      repo_id=repository, folder_path=str(folder), commit_message=message
    )
  except Exception as error:  # network, access rights, a license that it does not know
    raise SettingError(
      setting, repository, f"cannot be uploaded to the hub: {one_line(error)}"
    ) from None


def import_hub(setting: str, value: str) -> Any:
  """Imports huggingface_hub; raises SettingError if it is not installed."""
  try:
    import huggingface_hub  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise SettingError(
      setting, value, "needs huggingface_hub: pip install -e '.[hub]'"
    ) from None
  return huggingface_hub
