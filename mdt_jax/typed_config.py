"""Turns ConfigDicts into frozen dataclasses, and back. Knows no particular setting."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mdt_jax.errors import SettingError, named_in_errors


def parse(cls: type[Any], config: ConfigDict, prefix: str) -> Any:
  """Returns the settings of a group from its ConfigDict.

  Args:
    cls: frozen dataclass. A field is a number, a string, a tuple, a dict, a group, or
      one of these or None, or one of several of these, such as `int | tuple[int, int]`.
      `cls` may raise SettingError for a field.
    config: ConfigDict with all fields of `cls`.
    prefix: name of the group in errors, such as "config.model".

  Raises:
    SettingError: a field is missing or unknown, of another type, or not finite.
  """
  types_of = typing.get_type_hints(cls)
  for name in config:
    if name not in types_of:
      near = difflib.get_close_matches(name, types_of, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise SettingError(f"{prefix}.{name}", config[name], f"no such setting{hint}")
  values = {}
  for name, accepted in types_of.items():
    setting = f"{prefix}.{name}"
    if name not in config:
      raise SettingError(
        setting, None, "is missing: the config file or a flag removed it"
      )
    if dataclasses.is_dataclass(accepted):
      if not isinstance(config[name], ConfigDict):
        raise SettingError(setting, config[name], "must be a group of settings")
      values[name] = parse(accepted, config[name], setting)  # type: ignore[arg-type]
    else:
      values[name] = parse_value(config[name], accepted, setting)
  with named_in_errors(prefix):
    return cls(**values)


def parse_value(value: Any, accepted: Any, setting: str) -> Any:
  """Checks the type of a setting.

  Args:
    value: value of the setting.
    accepted: annotation of the field, such as `int | None`.
    setting: name of the setting in errors.

  Returns:
    The value; a whole number becomes a float if the setting is a float.

  Raises:
    SettingError: the value has another type, or is not finite.
  """
  kind, is_optional = kind_of(accepted)
  if value is None and is_optional:
    return None
  if kind is dict and isinstance(value, ConfigDict | dict):
    found = value.to_dict() if isinstance(value, ConfigDict) else value
    if not all(isinstance(name, str) for name in found):
      raise SettingError(setting, found, "must be a dict whose names are texts")
    return _with_tuples(found)
  kinds = _kinds_of(accepted)
  if tuple in kinds and isinstance(value, list):
    return tuple(value)
  if len(kinds) > 1:
    if isinstance(value, bool) or not isinstance(value, tuple(kinds)):
      names = " or ".join(kind.__name__ for kind in kinds)
      raise SettingError(setting, value, f"must be of type {names}")
    return value
  if kind not in (int, float):
    if not isinstance(value, kind):
      raise SettingError(setting, value, f"must be of type {kind.__name__}")
    return value
  accepted_types = (int,) if kind is int else (int, float)
  if isinstance(value, bool) or not isinstance(value, accepted_types):
    raise SettingError(setting, value, f"must be of type {kind.__name__}")
  if not math.isfinite(value):
    raise SettingError(setting, value, "must be finite")
  # A float setting must be a float: XLA compiles x**4 and x**4.0 differently.
  return kind(value)


def _with_tuples(value: Any) -> Any:
  """Returns the value with tuples in the place of lists; JSON has no tuples."""
  if isinstance(value, dict):
    return {name: _with_tuples(entry) for name, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(_with_tuples(entry) for entry in value)
  return value


def kind_of(accepted: Any) -> tuple[type[Any], bool]:
  """Returns the class of an annotation such as `int | None`, and if it has None.

  The class is `object` for an annotation of several, such as `int | tuple[int, int]`.
  """
  kinds = _kinds_of(accepted)
  is_optional = types.NoneType in typing.get_args(accepted)
  return kinds[0] if len(kinds) == 1 else object, is_optional


def _kinds_of(accepted: Any) -> list[type[Any]]:
  """Returns the classes of an annotation, without None."""
  options: Iterable[Any] = (accepted,)
  if isinstance(accepted, types.UnionType):
    options = typing.get_args(accepted)
  return [typing.get_origin(o) or o for o in options if o is not types.NoneType]


def setting_types(cls: type[Any], prefix: str = "") -> dict[str, Any]:
  """Returns the annotation of each setting and group, by dotted name.

  Args:
    cls: frozen dataclass, such as Settings.
    prefix: start of the names, such as "model.".
  """
  types_of = {}
  for name, accepted in typing.get_type_hints(cls).items():
    types_of[prefix + name] = accepted
    if dataclasses.is_dataclass(accepted):
      group: Any = accepted
      types_of.update(setting_types(group, f"{prefix}{name}."))
  return types_of


def to_config(settings: Any) -> ConfigDict:
  """Returns a ConfigDict with the fields of a group.

  A field that may be None keeps its type: assigning another type raises TypeError. A
  field of several types takes any value; `parse` checks its type.
  """
  config = ConfigDict()
  types_of = typing.get_type_hints(type(settings))
  for name, accepted in types_of.items():
    value = getattr(settings, name)
    if dataclasses.is_dataclass(value):
      config[name] = to_config(value)
      continue
    kind, is_optional = kind_of(accepted)
    if is_optional or kind is object:
      config[name] = placeholder(kind)
      if value is not None:
        config[name] = value
    else:
      config[name] = ConfigDict(value) if kind is dict else value
  return config


def known_settings(
  saved: Mapping[str, Any], settings: Any, prefix: str
) -> tuple[dict[str, Any], list[str]]:
  """Splits saved settings into those of this version and the names of the others."""
  known, unknown = {}, []
  for name, value in saved.items():
    if not hasattr(settings, name):
      unknown.append(f"{prefix}.{name}")
    elif dataclasses.is_dataclass(group := getattr(settings, name)):
      known[name], more = known_settings(value, group, f"{prefix}.{name}")
      unknown += more
    else:
      known[name] = value
  return known, unknown
