"""The error that a user can mend: one line, exit code 2."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class SettingError(ValueError):
  """A setting has a value that cannot be used.

  Args:
    setting: the setting's name as the user writes it, such as
      `config.batch_size`, `--labels` or a path.
    value: the value it has.
    accepted: what would be accepted, as the end of the sentence
      "<setting> = <value>: …".
  """

  def __init__(self, setting: str, value: Any, accepted: str):
    self.setting = setting
    self.value = value
    self.accepted = accepted
    super().__init__(setting, value, accepted)  # as it is unpickled, from a worker

  def __str__(self) -> str:
    return f"{self.setting} = {self.value!r}: {self.accepted}"


def check_choice(setting: str, value: Any, choices: Iterable[Any]) -> None:
  """Raises SettingError where `value` is none of `choices`."""
  choices = list(choices)
  if value not in choices:
    names = ", ".join(str(choice) for choice in choices)
    raise SettingError(setting, value, f"accepted are {names}")


def check_arguments(
  function: Callable[..., Any], given: Mapping[str, Any], what: str
) -> None:
  """Raises SettingError for an argument that a function does not take, or lacks.

  Args:
    function: that is to be called.
    given: its keyword arguments.
    what: the function makes, for the error.
  """
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return
  for name, value in given.items():
    if name not in parameters:
      raise SettingError(name, value, f"is no setting of {what}")
  for name, parameter in parameters.items():
    if parameter.default is parameter.empty and name not in given:
      raise SettingError(name, None, f"must be given: a setting of {what}")


@contextlib.contextmanager
def named_in_errors(prefix: str) -> Iterator[None]:
  """Puts `prefix` and a dot before the name of a setting in errors."""
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
  """Rewrites the name of a setting in errors, as the flag of a command.

  Args:
    names: setting -> name in the error; others keep theirs.
  """
  try:
    yield
  except SettingError as error:
    setting = names.get(error.setting, error.setting)
    raise SettingError(setting, error.value, error.accepted) from None
