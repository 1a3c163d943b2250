"""What all commands share: flags, plain log lines, exit codes."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from mdt_jax.errors import SettingError
from mdt_jax.logs import logger

COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0, where there are several."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Find the three above: TPU pod, Slurm, GKE, Open MPI."
)
JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all.")

EXIT_BAD_SETTING = 2
EXIT_INTERRUPTED = 130  # as a shell gives for Ctrl-C

# TensorFlow writes our event files and nothing else: its notices say nothing here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command; a setting that cannot be used is one line and exit code 2."""

  def guarded(argv: list[str]) -> None:
    _plain_log_lines()
    if len(argv) > 1:
      _refuse(f"unknown argument {argv[1]!r}: settings are given as --name=value")
    try:
      _join()
      main(argv)
    except SettingError as error:
      _refuse(f"--{error}" if error.setting in flags.FLAGS else str(error))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(EXIT_INTERRUPTED)

  app.run(guarded, flags_parser=_parse_flags)


def load_config(holder: flags.FlagHolder[ConfigDict]) -> ConfigDict:
  """The config of a flag of `config_flags.DEFINE_config_file`, named "config"."""
  try:
    config = holder.value
  except OSError:  # what a missing file gives, at its first use
    config = None
  if not isinstance(config, ConfigDict):
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    raise SettingError(
      "--config", path, "must be a Python file with get_config() -> ConfigDict"
    )
  return config.copy_and_resolve_references()


def _join() -> None:
  """Joins the other processes, if there are any; only the first one logs."""
  from mdt_jax.training import distributed  # imports JAX

  if JOIN_TIMEOUT.value < 1:
    raise SettingError("--join_timeout", JOIN_TIMEOUT.value, "must be at least 1")
  distributed.start(
    COORDINATOR_ADDRESS.value,
    NUM_PROCESSES.value,
    PROCESS_ID.value,
    detect=DISTRIBUTED.value,
    timeout=JOIN_TIMEOUT.value,
  )
  if distributed.process_index() > 0:
    logger.setLevel(logging.WARNING)


def _plain_log_lines() -> None:
  """Our lines as they are, on stdout; of the libraries (Orbax: much) warnings only."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger.setLevel(logging.INFO)
  logger.propagate = False
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger.handlers = [handler]


def _parse_flags(argv: list[str]) -> list[str]:
  absl_logging.set_verbosity(absl_logging.ERROR)  # errors are printed below
  try:
    return flags.FLAGS(argv)
  except (flags.Error, SettingError) as error:
    if "--config=None" in str(error) and any(a.startswith("--config=") for a in argv):
      _refuse("--config: get_config() of the file returns nothing")
    _refuse(str(error))
  except OSError as error:  # a config file that is not there
    _refuse(f"--config = {error.filename!r}: {error.strerror}")
  except (Exception, SystemExit) as error:
    if place := _place_in_config(error, argv):
      _refuse(f"--config: {place}: {type(error).__name__}: {error}")
    if isinstance(error, SystemExit):  # of --help, which absl takes for a failure
      sys.exit(0)
    if not isinstance(error, (AttributeError, KeyError)):
      raise
    # ml_collections: a config file, or a flag, names a field that there is not.
    text = str(error)
    if "get_config" in text:
      _refuse("--config: the file has no function get_config()")
    unknown = re.search(r'Key "(\w+)" does not exist', text) or re.match(
      r"[\\'\"]*(\w+)[\\'\"]*($|\\n|\n)", text
    )
    if not unknown:
      raise
    hint = re.search(r'Did you mean "(\w+)"', text)
    accepted = f"; did you mean {hint[1]}?" if hint else ""
    _refuse(f"config has no field {unknown[1]!r}{accepted}")


def _place_in_config(error: BaseException, argv: list[str]) -> str | None:
  """FILE:LINE of a config file that raised an error; None if nothing of it did."""
  values = (argument.removeprefix("--config=") for argument in argv)
  paths = {os.path.abspath(value.partition(":")[0]) for value in values}
  frames = traceback.extract_tb(error.__traceback__)
  places = [(frame.filename, frame.lineno) for frame in frames]
  if isinstance(error, SyntaxError):
    if error.filename is None:  # not even text
      return "the file"
    places.append((error.filename, error.lineno))
  for path, line in reversed(places):
    if path and os.path.abspath(path) in paths:
      return f"{path}:{line}"
  return None


def _refuse(message: str) -> NoReturn:
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(EXIT_BAD_SETTING)
