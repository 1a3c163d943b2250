"""The flag --config: finds the file, on disk or in the package, and loads it."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from mdt_jax.errors import SettingError
from mdt_jax.exit_codes import EXIT_BAD_SETTING

flags.disclaim_key_flags()  # --config belongs to the command that defines it

PACKAGED = Path(__file__).parents[1] / "configs"
# Folders in which a clone shows the packaged configs.
_FOLDERS = ("", "configs", os.path.join("mdt_jax", "configs"))


def define_config() -> flags.FlagHolder[ConfigDict]:
  """Defines --config, and --config.NAME=VALUE for each of its settings."""
  try:
    return config_flags.DEFINE_config_file(
      "config",
      None,
      "Config of the run: the name of a packaged config, such as digits or mdtv2_b2, "
      "or a Python file with a function get_config(). A text after a colon goes to the "
      "function: FILE:TEXT. --config.NAME=VALUE changes a setting; "
      "mdt_jax/setting_groups/ describes all settings.",
      lock_config=True,
    )
  except flags.Error as error:  # ml_collections reads the file of --flagfile here
    sys.exit(refusal(str(error)))


def refusal(message: str) -> int:
  """Prints an error on one line, and returns the exit code for it."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  return EXIT_BAD_SETTING


def load_config(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
  """Returns the config that `define_config` has read, with its changed settings.

  Raises:
    SettingError: get_config() of the file returns no ConfigDict.
  """
  try:
    config = holder.value
  except OSError:  # the file disappeared, or cannot be read
    config = None
  if not isinstance(config, ConfigDict):
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    raise SettingError(
      "--config", path, "must be a Python file with get_config() -> ConfigDict"
    )
  return config.copy_and_resolve_references()


def packaged_configs() -> list[str]:
  """Returns the names of the configs that the package holds."""
  return sorted(path.stem for path in PACKAGED.glob("*.py"))


def is_packaged(path: str) -> bool:
  """Whether `path` names a packaged config: digits, digits.py, configs/digits.py."""
  folder, name = os.path.split(os.path.normpath(path))
  return folder in _FOLDERS and name.removesuffix(".py") in packaged_configs()


def find_config(value: str) -> str:
  """Returns the value of --config with the path of a file that exists.

  Args:
    value: PATH or PATH:TEXT. A file on disk comes before a packaged config of the
      same name.

  Raises:
    SettingError: neither a file nor a packaged config has this name.
  """
  path, colon, text = value.partition(":")
  if os.path.isfile(path):
    return value
  if os.path.exists(path) and not os.path.isdir(path):  # reading a pipe would hang
    raise SettingError("--config", path, "must be a regular file")
  if is_packaged(path):
    stem = Path(path).name.removesuffix(".py")
    return f"{PACKAGED / stem}.py{colon}{text}"
  names = packaged_configs()
  stem = Path(path).name.removesuffix(".py")
  near = difflib.get_close_matches(stem, names, 1)
  hint = f"; did you mean {near[0]}?" if near else ""
  problem = "is a folder" if os.path.isdir(path) else "no such file"
  raise SettingError(
    "--config", path, f"{problem}; packaged configs are {', '.join(names)}{hint}"
  )


def place_of_error(error: BaseException, arguments: Sequence[str]) -> str | None:
  """Returns FILE:LINE of the config file that raised an error.

  Args:
    error: the exception.
    arguments: of the command, with the value of --config as `find_config` returns it.

  Returns:
    None if the error comes from elsewhere.
  """
  values = (argument.removeprefix("--config=") for argument in arguments)
  typed = [value.partition(":")[0] for value in values]
  paths = {os.path.abspath(path) for path in typed}
  frames = traceback.extract_tb(error.__traceback__)
  places = [(frame.filename, frame.lineno) for frame in frames]
  if isinstance(error, SyntaxError):
    if error.filename is None:  # the file is not even text
      return next((path for path in typed if os.path.isfile(path)), "the file")
    places.append((error.filename, error.lineno))
  for path, line in reversed(places):
    if path and os.path.abspath(path) in paths:
      return f"{path}:{line}"
  return None
