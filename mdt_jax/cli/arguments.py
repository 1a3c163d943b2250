"""Checks the arguments of a command before absl parses them, and says what was meant.

absl stops at the first argument that it does not know and names nothing else. These
checks know the settings of a config, so that they can suggest --config.batch_size for
--batch_size.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from mdt_jax.cli.config_files import find_config, is_packaged
from mdt_jax.cli.setting_names import (
  MAX_HINTS,
  SYNONYMS,
  all_settings,
  describe_group,
  is_own_argument,
  listed,
  near_settings,
  with_value,
)
from mdt_jax.errors import SettingError
from mdt_jax.typed_config import kind_of

_ACCEPTED: dict[type[Any], str] = {
  int: "must be a whole number",
  float: "must be a number",
  bool: "must be true or false",
  tuple: "must be numbers with commas between them, such as 0.2,0.8",
  dict: "must be a dict in quotes, such as '{\"scale\": 2.0}'",
}
_PARSERS: dict[type[Any], flags.ArgumentParser[Any]] = {
  int: flags.IntegerParser(),
  float: flags.FloatParser(),
  bool: flags.BooleanParser(),
}


class UsageError(Exception):
  """Arguments that a command does not accept; the message is one line."""


class Arguments:
  """The checks of one command.

  Args:
    command: name for messages, such as "mdt_jax.sample".
    own: names of the command's flags.
    examples: name of each required flag -> an example of its value.
    aliases: other name of a flag -> name.
    replacements: name of an unknown flag -> what to write in its place.
    flag_values: all flags that absl knows.
  """

  def __init__(
    self,
    command: str,
    own: Sequence[str],
    examples: Mapping[str, str],
    aliases: Mapping[str, str],
    replacements: Mapping[str, str],
    flag_values: flags.FlagValues = flags.FLAGS,
  ):
    self._command = command
    self._own = list(own)
    self._examples = examples
    self._aliases = aliases
    self._replacements = replacements
    self._flags = flag_values
    self._has_config = "config" in self._own
    self._given: dict[str, tuple[str, str]] = {}  # name -> (flag as typed, value)

  def check(self, arguments: Sequence[str]) -> list[str]:
    """Returns the arguments in the form --name=value, with the path of the config.

    Raises:
      UsageError: an argument is unknown, misses its value, or repeats another one
        under another name; or a required flag is missing.
      SettingError: a value is empty or of a wrong type, or a config is not found.
    """
    checked = []
    early = None  # a setting that comes before --config
    for argument, typed, value in self._pairs(arguments):
      name = typed.lstrip("-")
      checked.append(argument)
      if self._is_override(name):
        _check_override(typed, value)
        if "config" not in self._given:
          early = early or typed
        continue
      known = name if name in self._flags else name.removeprefix("no")
      target = self._aliases.get(known, known)
      before = self._given.get(target, (typed, ""))[0].lstrip("-")
      if before != name and {before, name} & set(self._aliases):
        raise UsageError(
          f"{typed} and --{before} are two names of one flag: give only one of them"
        )
      if name in self._flags and value is not None:
        _check_value(typed, self._flags[name], value)
      self._given[target] = (typed, value or "")
      if name == "config" and value:
        checked[-1] = f"--config={find_config(value)}"
    self._check_required()
    if early is not None:
      raise UsageError(f"{early} must come after --config={self._given['config'][1]}")
    return checked

  def _pairs(self, arguments: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """(--name=value, --name, value or None) of each argument, all of them known."""
    rest = iter(arguments)
    before = ""  # the last flag, if it takes no separate value
    for argument in rest:
      if argument == "--" or not argument.strip("-"):
        argument = next(rest, argument)
        raise self._positional(argument, before)
      if not argument.startswith("-"):
        raise self._positional(argument, before)
      typed, equals, text = argument.partition("=")
      name = typed.lstrip("-")
      value = text if equals else None
      is_boolean = self._is_boolean(name, typed, value)
      before = typed if is_boolean and value is None else ""
      if is_boolean or value is not None:
        yield argument, typed, value
        continue
      value = next(rest, None)
      if value is None or value.startswith("--"):
        raise UsageError(f"{typed} needs a value: {typed}=VALUE")
      yield f"{typed}={value}", typed, value

  def _is_override(self, name: str) -> bool:
    return self._has_config and name.startswith(("config.", "noconfig."))

  def _is_boolean(self, name: str, typed: str, value: str | None) -> bool:
    """Whether a flag may stand without a value.

    Raises:
      UsageError: there is no such flag.
    """
    if self._is_override(name):
      accepted = all_settings().get(name.partition(".")[2])
      return name.startswith("no") or (
        accepted is not None and kind_of(accepted)[0] is bool
      )
    if name in self._flags:
      return self._flags[name].boolean
    positive = name.removeprefix("no")
    if name != positive and positive in self._flags and self._flags[positive].boolean:
      if value is not None:
        raise UsageError(f"{typed} takes no value: write --{positive}={value}")
      return True
    raise self._unknown(name, typed, value)

  def _positional(self, argument: str, before: str) -> UsageError:
    """The error of an argument without a flag before it."""
    name, equals, value = argument.partition("=")
    if equals and name.replace(".", "").replace("_", "").isalnum():
      hints = self._hints(name) or [f"--{name}"]
      near = with_value(hints[0], value)
      return UsageError(f"unknown argument {argument!r}: did you mean {near}?")
    if before:
      return UsageError(
        f"unknown argument {argument!r}: did you mean {before}={argument}?"
      )
    path = argument.partition(":")[0]
    missing = [name for name in self._examples if name not in self._given]
    if "config" in missing and not (path.endswith(".py") or is_packaged(path)):
      missing.remove("config")
    end = "flags have the form --name=value"
    if missing:
      end = f"did you mean --{missing[0]}={argument}?"
    return UsageError(f"unknown argument {argument!r}: {end}")

  def _unknown(self, name: str, typed: str, value: str | None) -> UsageError:
    """The error of a flag that there is not."""
    note = ""
    if not self._has_config and name.partition(".")[0] in ("config", "noconfig"):
      note = f": {self._command} reads no config"
      if "checkpoint" in self._own:
        note += ", the checkpoint holds the settings of its run"
    hints = self._hints(name.rpartition(".")[2] if note else name)
    separator = ";" if note else ":"
    end = f"see python -m {self._command} --help"
    if hints:
      end = f"did you mean {listed([with_value(hint, value) for hint in hints])}?"
    return UsageError(f"unknown flag {typed}{note}{separator} {end}")

  def _hints(self, name: str) -> list[str]:
    """Flags that may be meant by an unknown one, the best first."""
    name = name.replace("-", "_").lower()
    if name in self._replacements:
      return [self._replacements[name]]
    if name in self._own:
      return [f"--{name}"]
    settings = near_settings(name) if self._has_config else []
    if self._has_config and name in all_settings():
      return settings[:1]
    synonyms = [other for other in SYNONYMS.get(name, []) if other in self._own]
    if synonyms:
      return [f"--{synonyms[0]}"]
    near = difflib.get_close_matches(name, self._own, MAX_HINTS, cutoff=0.7)
    if not near and not settings:
      near = [other for other in self._own if _resembles(name, other)]
    return [*[f"--{other}" for other in near], *settings][:MAX_HINTS]

  def _check_required(self) -> None:
    for name, example in self._examples.items():
      value = self._given[name][1] if name in self._given else None
      if not value:
        raise missing_flag(self._flags[name], value, example)


def missing_flag(
  flag: flags.Flag[Any], value: str | None, example: str
) -> UsageError | SettingError:
  """The error of a flag that a command needs.

  Args:
    flag: the flag.
    value: its value: "" for an empty one, None for a flag that is not given.
    example: a value to show.
  """
  what = (flag.help or "").partition(". ")[0].rstrip(".")
  accepted = f"must be given, for example --{flag.name}={example} ({what})"
  if value is None:
    return UsageError(f"--{flag.name} {accepted}")
  return SettingError(f"--{flag.name}", value, accepted)


def _check_override(typed: str, value: str | None) -> None:
  """Checks --config.NAME=VALUE against the settings.

  Raises:
    SettingError: there is no such setting, or its value is of another type.
  """
  path = typed.lstrip("-").partition(".")[2]
  if is_own_argument(path):
    return  # the config file knows which arguments it sets
  settings = all_settings()
  if path not in settings:
    hints = [with_value(hint, value) for hint in near_settings(path)]
    hint = f"; did you mean {listed(hints)}?" if hints else ""
    raise SettingError(typed, value, f"no such setting{hint}")
  if value is None:
    return
  kind, is_optional = kind_of(settings[path])
  if dataclasses.is_dataclass(kind):
    if not _parses(dict, value):
      raise SettingError(typed, value, describe_group(path, value))
  elif not _parses(kind, value):
    end = _whole_number_hint(kind, value)
    if is_optional and value.lower() == "none":
      end = "; only a config file can set None"
    raise SettingError(typed, value, f"{_ACCEPTED[kind]}{end}")


def _check_value(typed: str, flag: flags.Flag[Any], value: str) -> None:
  """Raises SettingError where the value of a flag is of another type."""
  kinds = (
    (flags.BooleanParser, bool),
    (flags.IntegerParser, int),
    (flags.FloatParser, float),
  )
  for parser, kind in kinds:
    if isinstance(flag.parser, parser) and not _parses(kind, value):
      end = _whole_number_hint(kind, value)
      raise SettingError(typed, value, f"{_ACCEPTED[kind]}{end}")


def _parses(kind: type[Any], text: str) -> bool:
  """Whether a text is a value of a type, as absl and ml_collections read it."""
  try:
    if kind in _PARSERS:
      _PARSERS[kind].parse(text)
    elif kind is tuple:
      value = ast.literal_eval(text)
      values = value if isinstance(value, tuple | list) else [value]
      return all(isinstance(entry, int | float) for entry in values)
    elif kind is dict:
      return isinstance(ast.literal_eval(text), dict)
  except (ValueError, TypeError, SyntaxError):
    return False
  return True


def _whole_number_hint(kind: type[Any], text: str) -> str:
  """How to write a whole number that is given as 4e5 or 64.0."""
  if kind is int and _parses(float, text) and float(text).is_integer():
    return f", such as {float(text):.0f}"
  return ""


def _resembles(typed: str, name: str) -> bool:
  """Whether `typed` abbreviates or contains `name`: ckpt or my_labels."""
  letters = iter(name)
  abbreviates = typed[0] == name[0] and all(letter in letters for letter in typed)
  return (abbreviates and len(typed) > 2) or (name in typed and len(name) > 2)
