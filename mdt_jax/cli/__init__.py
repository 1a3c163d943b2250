"""What all commands share: flags, one-line errors, log lines and exit codes."""

from __future__ import annotations

from mdt_jax.interrupts import handle_sigterm, raise_on_sigint

import ast
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from mdt_jax.buckets import may_pass, reason_of_bucket
from mdt_jax.cli import streams, usage
from mdt_jax.cli.arguments import Arguments, UsageError, missing_flag, with_value
from mdt_jax.cli.config_files import (
  define_config,
  load_config,
  place_of_error,
  refusal,
)
from mdt_jax.cli.run_folders import check_run_folder, is_run
from mdt_jax.errors import DataUnavailable, SettingError, reason_of_machine
from mdt_jax.exit_codes import (
  EXIT_BAD_SETTING,
  EXIT_INTERRUPTED,
  EXIT_OTHER,
  EXIT_TRY_AGAIN,
)
from mdt_jax.logs import logger, print_log_lines

__all__ = [
  "EXIT_BAD_SETTING",
  "EXIT_INTERRUPTED",
  "check_run_folder",
  "define_alias",
  "define_config",
  "is_run",
  "load_config",
  "require",
  "required_value",
  "run",
  "suggest",
]

COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0. Default: $JAX_COORDINATOR_ADDRESS.",
)
NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes. Default: $JAX_NUM_PROCESSES, or 1."
)
PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0. Default: $JAX_PROCESS_ID, or 0."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Get the three values above from the TPU pod, Slurm, GKE or Open MPI.",
)
JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout",
  300,
  "Seconds to wait for the other processes, at least 1. After that the command exits "
  "with code 75.",
)
flags.disclaim_key_flags()  # a flag of define_alias belongs to the command


# Bounds of flags, far above what anyone computes, where memory would run out first.
MAX_IMAGES = 100_000_000
MAX_BATCH_SIZE = 65_536

_HELP = {"help", "helpshort", "h", "?"}
_HELP_OF_ABSL = {"helpfull", "helpxml"}
# Name of a required flag -> an example of its value.
_required: dict[str, str] = {}
# Alias -> flag.
_aliases: dict[str, str] = {}
# Name of an unknown flag -> what to write in its place.
_suggestions: dict[str, str] = {}

# Libraries may import TensorFlow where it is installed; its notices are noise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def require(**examples: str) -> None:
  """Makes flags required.

  Args:
    **examples: name of a flag -> an example of its value, for the error.
  """
  _required.update(examples)


def required_value(flag: flags.FlagHolder[str | None], example: str) -> str:
  """Returns the value of a flag that only some uses of a command need.

  Raises:
    UsageError: the flag is not given.
    SettingError: its value is empty.
  """
  if not flag.value:
    raise missing_flag(flags.FLAGS[flag.name], flag.value, example)
  return flag.value


def define_alias(alias: str, name: str) -> None:
  """Defines a second name of a flag."""
  flags.DEFINE_alias(alias, name)
  _aliases[alias] = name


def suggest(replacements: Mapping[str, str]) -> None:
  """Sets what errors suggest for flags that the command does not have.

  Args:
    replacements: name of such a flag -> what to write instead, without the value.
  """
  _suggestions.update(replacements)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command.

  A bad flag or setting ends in one line and exit code 2. A full or failing disk, and
  too little memory, end in one line and exit code 1. Data that cannot be read now, and
  a bucket that does not answer, end in one line and exit code 75.
  """

  def guarded(argv: list[str]) -> None:
    _plain_log_lines()
    try:
      _join()
      main(argv)
      distributed.wait_for_all()
    except UsageError as error:
      _end(f"error: {error}", EXIT_BAD_SETTING)
    except SettingError as error:
      is_flag = error.setting in flags.FLAGS
      _end(f"error: --{error}" if is_flag else f"error: {error}", EXIT_BAD_SETTING)
    except DataUnavailable as error:
      _end(f"error: {error}; repeat the command", EXIT_TRY_AGAIN)
    except KeyboardInterrupt:
      _end("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
      if (reason := reason_of_machine(error)) is not None:
        _end(f"error: {reason}", EXIT_OTHER)
      if (reason := reason_of_bucket(error)) is not None:
        if may_pass(error):
          _end(f"error: {reason}; repeat the command", EXIT_TRY_AGAIN)
        _end(f"error: {reason}", EXIT_BAD_SETTING)
      if not distributed.is_joined():
        raise
      traceback.print_exception(error)
      if distributed.is_loss(error):
        _end(distributed.LOST, EXIT_TRY_AGAIN)
      _end(f"error: {type(error).__name__}", EXIT_OTHER)

  from mdt_jax.training import distributed  # imports JAX

  streams.make_robust()
  handle_sigterm()
  raise_on_sigint()
  app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, main))


def _end(message: str, code: int) -> NoReturn:
  """Prints a line and ends the process.

  One of several processes ends at once: a normal exit would wait for the others, which
  may wait for this one.
  """
  from mdt_jax.training import distributed  # imports JAX

  print(" ".join(message.split()), file=sys.stderr)
  if distributed.is_joined():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def _join() -> None:
  """Connects the processes of the run, if there are several; only process 0 logs."""
  from mdt_jax.training import distributed  # imports JAX

  if JOIN_TIMEOUT.value < 1:
    raise SettingError("join_timeout", JOIN_TIMEOUT.value, "must be at least 1")
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
  """Prints the package's log lines as they are, and only warnings of libraries."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  print_log_lines()


def _parse_flags(argv: list[str], main: Callable[..., Any]) -> list[str]:
  """Parses the command line; refuses what the command does not accept."""
  absl_logging.set_verbosity(absl_logging.ERROR)  # the errors are printed below
  own, shared = (
    flags.FLAGS.get_key_flags_for_module(function.__module__)
    for function in (main, _join)
  )
  arguments = argv[1:]
  try:
    arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
    asked = {a.lstrip("-") for a in arguments if a.startswith("-")}
    for name in asked & _HELP_OF_ABSL:
      flags.FLAGS([argv[0], f"--{name}"])  # prints, and exits with code 1
    if asked & _HELP:
      groups = {"Flags": own, "Flags for several processes": shared}
      summary = main.__globals__["__doc__"] or ""
      print(usage.describe(summary, groups, _required, _aliases), end="")
      sys.exit(0)
    names = [flag.name for flag in (*own, *shared)]
    checks = Arguments(_name_of(main), names, _required, _aliases, _suggestions)
    arguments = checks.check(arguments)
    return flags.FLAGS([argv[0], *arguments])
  except (Exception, SystemExit) as error:
    _refuse_config(error, arguments)
    if isinstance(error, SystemExit):
      sys.exit(0)
    if isinstance(error, OSError):  # the config cannot be read
      _refuse(f"--config = {error.filename!r}: {error.strerror}")
    if isinstance(error, (AttributeError, KeyError)):
      _refuse_setting(error, arguments)
    if not isinstance(error, (flags.Error, SettingError, UsageError)):
      raise
    if "--config=None" in str(error):
      _refuse("--config: get_config() of the file returns nothing")
    _refuse(str(error))


def _refuse_config(error: BaseException, arguments: list[str]) -> None:
  """Refuses a config file that raised an error, which others may have replaced."""
  cause: BaseException | None = error
  while cause is not None:
    if place := place_of_error(cause, arguments):
      _refuse(f"--config: {place}: {type(cause).__name__}: {cause}")
    cause = cause.__cause__ or cause.__context__


def _refuse_setting(error: Exception, arguments: list[str]) -> NoReturn:
  """Refuses a config file that lacks get_config, or a setting that a flag changes."""
  text = str(error)
  if "get_config" in text:
    _refuse("--config: the file has no function get_config()")
  unknown = re.search(r'Key "(\w+)" does not exist', text) or re.match(
    r"[\\'\"]*(\w+)[\\'\"]*($|\\n|\n)", text
  )
  if not unknown:
    raise error
  hint = re.search(r'Did you mean "(\w+)"', text)
  accepted = f"; did you mean {hint[1]}?" if hint else ""
  name = unknown[1]
  flag, value = f"setting {name!r}", ""
  for argument in arguments:
    if re.match(rf"--(no)?config\.(.*\.)?{name}(=|$)", argument):
      flag, _, value = argument.partition("=")
  group = flag.replace("--no", "--", 1).rpartition(".")[0]
  if group.endswith(".arguments"):
    literal = f'{{"{name}": {_literal(value or "false")}}}'
    accepted = f"; give all arguments at once: {with_value(group, literal)}"
  _refuse(f"{flag}: the config file has no {name!r}{accepted}")


def _literal(text: str) -> str:
  """Returns the value of a flag as ml_collections reads it, written in Python."""
  try:
    return repr(ast.literal_eval({"true": "True", "false": "False"}.get(text, text)))
  except (ValueError, SyntaxError):
    return json.dumps(text)


def _name_of(main: Callable[..., Any]) -> str:
  """The name of a command, as python -m takes it."""
  spec = main.__globals__.get("__spec__")
  return (spec.name if spec else main.__module__).removesuffix(".__main__")


def _refuse(message: str) -> NoReturn:
  sys.exit(refusal(message))
