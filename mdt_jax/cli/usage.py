"""The text that --help prints: a command's own flags, without those of absl."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

WIDTH = 80
_PLACEHOLDERS = {
  flags.IntegerParser: "=INTEGER",
  flags.FloatParser: "=NUMBER",
  flags.ListParser: "=A,B,...",
}


def describe(
  summary: str,
  groups: Mapping[str, Sequence[flags.Flag[Any]]],
  required: Iterable[str],
  aliases: Mapping[str, str],
) -> str:
  """Returns the help of a command.

  Args:
    summary: what the command does; its docstring.
    groups: heading -> flags.
    required: names of the flags that must be given.
    aliases: alias -> flag.
  """
  parts = [summary.strip()]
  for heading, members in groups.items():
    entries = [
      _describe_flag(flag, flag.name in required, aliases)
      for flag in members
      if flag.name not in aliases
    ]
    parts.append("\n".join([f"{heading}:", *entries]))
  parts.append("--helpfull also lists the flags of absl and other libraries.")
  return "\n\n".join(parts) + "\n"


def _describe_flag(
  flag: flags.Flag[Any], is_required: bool, aliases: Mapping[str, str]
) -> str:
  """A line with the name and the form of a flag, then what it does."""
  if flag.boolean:
    form = f"--[no]{flag.name}"
  else:
    parser = type(flag.parser)
    form = f"--{flag.name}{_PLACEHOLDERS.get(parser, '=TEXT')}"
  others = [f"--{alias}" for alias, name in aliases.items() if name == flag.name]
  if others:
    form += f"  (or {', '.join(others)})"
  text = flag.help or ""
  if is_required:
    text += " Required."
  elif flag.default is not None and "Default:" not in text:
    default = flag.default
    if isinstance(default, bool):
      default = str(default).lower()
    elif isinstance(default, list):
      default = ",".join(default)
    text += f" Default: {default}."
  return f"  {form}\n" + textwrap.fill(
    text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
  )
