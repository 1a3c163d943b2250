"""Checks that several groups of settings share."""

from __future__ import annotations

from typing import Any

from mdt_jax.errors import SettingError


def split_commas(text: str) -> tuple[str, ...]:
  """The parts of a text between commas, without spaces around them or empty parts.

  A comma inside brackets is part of a regular expression, such as blocks/fc[1,2] or
  a{2,3}.
  """
  parts, depth = [""], 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth <= 0:
      parts.append("")
    else:
      parts[-1] += character
  return tuple(part for part in map(str.strip, parts) if part)


def at_least(settings: Any, name: str, least: int) -> None:
  """Raises SettingError if a setting of a group is smaller than `least`."""
  if getattr(settings, name) < least:
    raise SettingError(name, getattr(settings, name), f"must be at least {least}")
