"""Errors that a user can fix, which commands print in one line."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class SettingError(ValueError):
  """A setting or an argument has a value that cannot be used.

  Args:
    setting: its name as the user writes it, such as `config.batch_size`, `--labels` or
      `path`.
    value: its value.
    accepted: what is accepted; ends the sentence "<setting> = <value>: …".
  """

  def __init__(self, setting: str, value: Any, accepted: str):
    self.setting = setting
    self.value = value
    self.accepted = accepted
    super().__init__(setting, value, accepted)  # pickled by workers, with these args

  def __str__(self) -> str:
    return f"{self.setting} = {self.value!r}: {self.accepted}"


class DataUnavailable(Exception):
  """The data cannot be read now, for a reason that may pass, as a disk that is away.

  Commands end with `exit_codes.EXIT_TRY_AGAIN`: the same command resumes.
  """


# Errors of a disk that is full, over its quota, failing or mounted read-only.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
LARGEST_NUMBER = 1e30  # of `check_number`; float32 ends at 3e38


def one_line(error: BaseException | str, limit: int = 300) -> str:
  """Returns the text of an error in one line, without control characters.

  Args:
    error: the error, or its text. Without a text, the type of the error counts.
    limit: largest number of characters; a longer text is cut off.
  """
  text = " ".join(str(error).split()) or type(error).__name__
  # A terminal would obey control characters; no stream can write lone surrogates.
  shown = "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode()
    for c in text[: limit + 1]
  )
  return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def reason_of_machine(error: Exception) -> str | None:
  """Describes, in one line, a fault of the machine that caused an exception.

  Returns:
    The disk or the memory as the cause; None for any other cause.
  """
  text = str(error)
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return (
      f"too little memory: {one_line(text.strip() or 'an array cannot be allocated')}"
    )
  if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{os.strerror(error.errno)}"
  return None


def check_choice(setting: str, value: Any, choices: Iterable[Any]) -> None:
  """Raises SettingError if `value` is not one of `choices`."""
  choices = list(choices)
  if value not in choices:
    names = ", ".join(str(choice) for choice in choices)
    raise SettingError(setting, value, f"accepted are {names}")


def check_range(setting: str, value: float | None, low: float, high: float) -> None:
  """Raises SettingError unless `value` is None or lies in [low, high]."""
  if value is not None and not low <= value <= high:
    raise SettingError(setting, value, f"must lie in [{low:,}, {high:,}]")


def check_number(setting: str, value: Any, *, above: float | None = None) -> None:
  """Raises SettingError unless `value` is a number that float32 computes with.

  Args:
    setting, value: the setting.
    above: the exclusive limit; None for none.
  """
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or value != value:  # NaN
    raise SettingError(setting, value, "must be a number")
  if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
    limit = f"{LARGEST_NUMBER:g}"
    raise SettingError(setting, value, f"must lie in [-{limit}, {limit}]")
  if above is not None and not value > above:
    raise SettingError(setting, value, f"must be above {above:g}")


def check_arguments(
  function: Callable[..., Any],
  given: Mapping[str, Any],
  what: str,
  *,
  added: Mapping[str, Any] | None = None,
) -> None:
  """Raises SettingError for a keyword argument that is unknown or missing.

  Args:
    function: the function to be called.
    given: its keyword arguments that the user sets.
    what: what the function makes, for the error.
    added: further keyword arguments, which the user does not set.
  """
  added = added or {}
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return
  for name, value in {**added, **given}.items():
    if name not in parameters:
      known = ", ".join(sorted(parameters.keys() - added.keys())) or "none"
      raise SettingError(name, value, f"is no setting of {what}; accepted are {known}")
  for name, parameter in parameters.items():
    if parameter.default is parameter.empty and name not in {**added, **given}:
      raise SettingError(name, None, f"must be given: a setting of {what}")


@contextlib.contextmanager
def named_in_errors(prefix: str) -> Iterator[None]:
  """Puts `prefix` and a dot before the setting's name in a SettingError."""
  try:
    yield
  except SettingError as error:
    if error.setting.startswith("config"):
      raise
    raise SettingError(
      f"{prefix}.{error.setting}", error.value, error.accepted
    ) from None


@contextlib.contextmanager
def renamed_in_errors(names: Mapping[str, str]) -> Iterator[None]:
  """Renames settings in a SettingError, for example to the flags of a command.

  Args:
    names: name of a setting or a group -> its name in the error. Other settings keep
      their names.
  """
  try:
    yield
  except SettingError as error:
    setting = names.get(error.setting, error.setting)
    for group, name in names.items():
      if error.setting.startswith(f"{group}."):
        setting = name + error.setting[len(group) :]
    raise SettingError(setting, error.value, error.accepted) from None


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Describes the values that differ, such as "config.batch_size was 8, now 16".

  Args:
    old, new: name -> value. A name that is missing has the value None.
  """
  return [
    f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]
