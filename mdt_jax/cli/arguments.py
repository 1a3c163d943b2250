"""Checks the arguments of a command before absl parses them, and says what was meant.

absl suggests only flags that it knows. These checks also know the settings of a config,
so that they can suggest --config.batch_size for --batch_size.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from mdt_jax.buckets import is_bucket
from mdt_jax.cli.config_files import find_config, is_packaged
from mdt_jax.cli.setting_names import (
  SYNONYMS,
  all_settings,
  is_own_argument,
  near_settings,
)
from mdt_jax.errors import SettingError
from mdt_jax.paths import is_url, local_path
from mdt_jax.sizes import Size, parse_size
from mdt_jax.typed_config import kind_of

_MAX_HINTS = 3
_OF_THE_HUB = ("checkpoint", "weak_checkpoint")  # flags that may be hf://ORG/NAME
_LOCAL = ("config", "vae")  # flags whose files are not read from a bucket
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
    aliases: alias -> flag.
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
    self._given: dict[str, tuple[str, str]] = {}  # flag -> (it or its alias, value)

  def check(self, arguments: Sequence[str]) -> list[str]:
    """Returns the arguments in the form --name=value, with the path of the config.

    Raises:
      UsageError: an argument is unknown, misses its value, or repeats another one
        under another name; or a required flag is missing.
      SettingError: a value is empty or of a wrong type, or a config is not found.
    """
    self._given.clear()
    checked = []
    for name, value in self._pairs(arguments):
      if not self._is_override(name):
        known = name if name in self._flags else name.removeprefix("no")
        target = self._aliases.get(known, known)
        earlier, _ = self._given.get(target, (known, ""))
        if earlier != known:
          raise UsageError(f"--{earlier} and --{known} are one flag: give one of them")
        self._given[target] = (known, value or "")
        if name in self._flags and value is not None:
          _check_value(name, self._flags[name], value)
        if name == "config" and value:
          starts = {text[: len("--config.")] for text in checked}
          if "--config." in starts and any(s.startswith("--config=") for s in starts):
            raise UsageError(f"--config={value}: --config was given before; give one")
          value = find_config(value)
      elif value is not None:
        _check_override(name, value)
      checked.append(f"--{name}" if value is None else f"--{name}={value}")
    self._check_required()
    return checked

  def _pairs(self, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value or None) of each argument, all of them known."""
    undefok = re.findall(r"^--?undefok[=\n](.*)", "\n".join(arguments), re.MULTILINE)
    ignored = set(re.findall(r"[^\s,]+", ",".join(undefok)))
    rest = list(arguments)
    last = ""  # the flag before, if it has no value
    while rest:
      argument = rest.pop(0)
      typed, equals, text = argument.partition("=")
      name, value = typed.lstrip("-"), text if equals else None
      if argument == "--" and not rest:
        return
      if not name or name == typed:
        raise self._positional(rest[0] if argument == "--" else argument, last)
      if name == "undefok":
        rest = rest if equals else rest[1:]
        continue
      if name not in self._flags and {name, name.removeprefix("no")} & ignored:
        continue
      if typed.startswith("---"):
        raise self._unknown(name, typed, value)
      needs_no_value = self._needs_no_value(name, typed, value)
      last = f"--{name}" if needs_no_value and value is None else ""
      if value is None and not needs_no_value:
        if rest and not rest[0].startswith("--"):
          value = rest.pop(0)
        elif self._is_override(name) and is_own_argument(name.partition(".")[2]):
          value = "true"  # the config file knows whether the argument is a boolean
        else:
          raise UsageError(f"{typed} needs a value: {typed}=VALUE")
      yield name, value

  def _is_override(self, name: str) -> bool:
    return self._has_config and name.startswith(("config.", "noconfig."))

  def _needs_no_value(self, name: str, typed: str, value: str | None) -> bool:
    """Whether a flag needs no value.

    Raises:
      UsageError: there is no such flag, or it has a value and takes none.
    """
    positive = name.removeprefix("no")
    if self._is_override(name):
      path = positive.partition(".")[2]
      if path not in all_settings() and not is_own_argument(path):
        hints = near_settings(path)[:_MAX_HINTS]
        end = f"; did you mean {_either(hints, value)}?" if hints else ""
        raise UsageError(f"{typed}: no such setting{end}")
      if name == positive:
        return _is_boolean_setting(name)
    elif name in self._flags:
      return self._flags[name].boolean
    elif positive == name or not self._is_boolean(positive):
      raise self._unknown(name, typed, value)
    if value is not None:
      raise UsageError(f"{typed} takes no value: write --{positive}={value}")
    return True

  def _is_boolean(self, name: str) -> bool:
    """Whether a flag of the command, or of its config, is true or false."""
    if name in self._flags:
      return self._flags[name].boolean
    return self._has_config and _is_boolean_setting(name)

  def _positional(self, argument: str, last: str) -> UsageError:
    """The error for an argument that is no flag; `last` is the flag before, if bare."""
    name, equals, value = argument.partition("=")
    path = argument.partition(":")[0]
    missing = [name for name in self._examples if name not in self._given]
    if "config" in missing and not (path.endswith(".py") or is_packaged(path)):
      missing.remove("config")
    end = "flags have the form --name=value"
    if equals and name[:1].isalpha() and (hints := self._hints(name, value)):
      end = f"did you mean {_either(hints[:1], value)}?"
    elif last and _parses(bool, argument):
      end = f"did you mean {last}={argument}?"
    elif missing and not argument.startswith("-"):
      end = f"did you mean {_either([f'--{missing[0]}'], argument)}?"
    return UsageError(f"unknown argument {argument!r}: {end}")

  def _unknown(self, name: str, typed: str, value: str | None) -> UsageError:
    """The error for an unknown flag."""
    note = ""
    if not self._has_config and name.partition(".")[0] in ("config", "noconfig"):
      note = f": {self._command} reads no config"
      if "checkpoint" in self._own:
        note += ", the checkpoint holds the settings of its run"
    hints = self._hints(name.rpartition(".")[2] if note else name, value)
    separator = ";" if note else ":"
    end = f"see python -m {self._command} --help"
    if hints:
      end = f"did you mean {_either(hints, value)}?"
    return UsageError(f"unknown flag {typed}{note}{separator} {end}")

  def _hints(self, name: str, value: str | None) -> list[str]:
    """Flags that may be meant by an unknown one, the best first."""
    name = name.replace("-", "_").lower()
    if name in self._own:
      return [f"--{name}"]
    if name in self._replacements:
      return [self._replacements[name]]
    if name.startswith("no") and name[2:]:
      near = [hint[2:] for hint in self._hints(name[2:], value)]
      prefix = "--no" if value is None else "--"
      if booleans := [f"{prefix}{hint}" for hint in near if self._is_boolean(hint)]:
        return booleans
    settings = near_settings(name) if self._has_config else []
    if self._has_config and name in all_settings():
      return settings[:1]
    for other in SYNONYMS.get(name, []):
      if other in self._own or other in self._replacements:
        return [self._replacements.get(other, f"--{other}")]
    near = difflib.get_close_matches(name, self._own, _MAX_HINTS, cutoff=0.8)
    if not near and not settings:
      near = [other for other in self._own if _resembles(name, other)]
    return [*[f"--{other}" for other in near], *settings][:_MAX_HINTS]

  def _check_required(self) -> None:
    for name, example in self._examples.items():
      value = self._given[name][1] if name in self._given else None
      if not value:
        raise missing_flag(self._flags[name], value, example)


def missing_flag(
  flag: flags.Flag[Any], value: str | None, example: str
) -> UsageError | SettingError:
  """The error for a missing flag that a command needs.

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


def _check_override(name: str, value: str) -> None:
  """Raises SettingError where the value of --config.NAME is of another type."""
  path = name.partition(".")[2]
  if path not in all_settings():
    return  # the config file knows the type of an own argument
  if all_settings()[path] == Size:
    parse_size(f"--{name}", value)
    return
  kind, is_optional = kind_of(all_settings()[path])
  if dataclasses.is_dataclass(kind):
    if not _parses(dict, value):
      raise SettingError(f"--{name}", value, _describe_group(path, value))
  elif is_optional and value.lower() == "none" and not _parses(kind, value):
    accepted = f"{_ACCEPTED[kind]}; only a config file can set None"
    raise SettingError(f"--{name}", value, accepted)
  else:
    _check_type(name, kind, value)


def _check_value(name: str, flag: flags.Flag[Any], value: str) -> None:
  """Raises SettingError where a value is of another type, or is an unknown URL."""
  is_read = is_bucket(value) and name not in _LOCAL
  if is_url(value) and not is_read and name not in _OF_THE_HUB:
    local_path(f"--{name}", value)
  for kind, parser in _PARSERS.items():
    if isinstance(flag.parser, type(parser)):
      _check_type(name, kind, value)


def _check_type(name: str, kind: type[Any], value: str) -> None:
  if not _parses(kind, value):
    accepted = _ACCEPTED[kind] + _whole_number_hint(kind, value)
    raise SettingError(f"--{name}", value, accepted)


def _is_boolean_setting(name: str) -> bool:
  """Whether config.NAME is a setting that is true or false."""
  group, _, path = name.partition(".")
  accepted = all_settings().get(path) if group == "config" else None
  return accepted is not None and kind_of(accepted)[0] is bool


def _describe_group(group: str, value: str) -> str:
  """Returns the end of the error for --config.GROUP=VALUE: what to write instead.

  If the first setting of the group is a string, such as model.name, the hint gives it
  the value. Otherwise the hint lists the first settings of the group.
  """
  names = [name for name in all_settings() if name.startswith(f"{group}.")]
  hints = [f"--config.{name}" for name in names[:_MAX_HINTS]]
  if kind_of(all_settings()[names[0]])[0] is str:
    return f"is a group of settings; did you mean {_either(hints[:1], value)}?"
  return f"is a group of settings, such as {_either(hints, None)}"


def with_value(flag: str, value: str | None) -> str:
  """Returns FLAG=VALUE as a shell takes it, or FLAG if there is no value."""
  return flag if value is None else f"{flag}={shlex.quote(value)}"


def _either(names: Sequence[str], value: str | None) -> str:
  """Returns "a, b or c", each with the value."""
  names = [with_value(name, value) for name in names]
  return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


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
  abbreviates = typed[:1] == name[0] and all(letter in letters for letter in typed)
  return (abbreviates and len(typed) > 2) or (name in typed and len(name) > 2)
