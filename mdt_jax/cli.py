"""What all commands share: flags, plain log lines, exit codes."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from mdt_jax.errors import SettingError

EXIT_BAD_SETTING = 2
EXIT_INTERRUPTED = 130  # as a shell gives for Ctrl-C

# TensorFlow writes our event files and nothing else: its notices say nothing here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a command; a setting that cannot be used is one line and exit code 2."""

  def guarded(argv: Sequence[str]) -> None:
    _plain_log_lines()
    if len(argv) > 1:
      _refuse(f"unknown argument {argv[1]!r}: settings are given as --name=value")
    try:
      main(argv)
    except SettingError as error:
      _refuse(str(error))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(EXIT_INTERRUPTED)

  app.run(guarded, flags_parser=_parse_flags)


def _plain_log_lines() -> None:
  """Our lines as they are, on stdout; of the libraries (Orbax: much) warnings only."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger = logging.getLogger("mdt_jax")
  logger.setLevel(logging.INFO)
  logger.propagate = False
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger.handlers = [handler]


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, SettingError) as error:
    _refuse(str(error))
  except OSError as error:  # a config file that is not there
    _refuse(f"--config = {error.filename!r}: {error.strerror}")
  except (AttributeError, KeyError) as error:
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


def _refuse(message: str) -> None:
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(EXIT_BAD_SETTING)
