"""Frozen dataclasses from ConfigDicts, and back; knows no setting."""

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

from mdt_jax.errors import SettingError


def parse(cls: type[Any], config: ConfigDict, prefix: str) -> Any:
  """Settings of a group from its ConfigDict.

  Args:
    cls: frozen dataclass; a field is a number, a text, a tuple, a dict, a group, or one
      of them or None.
    config: has every field.
    prefix: name of the group in errors, such as "config.model".

  Raises:
    SettingError: a field is missing or unknown, of another type, or not finite.
  """
  types_of = typing.get_type_hints(cls)
  for name in config:
    if name not in types_of:
      near = difflib.get_close_matches(name, types_of, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise SettingError(f"{prefix}.{name}", config[name], f"is no setting{hint}")
  values = {}
  for name, accepted in types_of.items():
    setting = f"{prefix}.{name}"
    if name not in config:
      raise SettingError(setting, None, "is missing, the file takes it away")
    if dataclasses.is_dataclass(accepted):
      if not isinstance(config[name], ConfigDict):
        raise SettingError(setting, config[name], "must be a group of settings")
      values[name] = parse(accepted, config[name], setting)  # type: ignore[arg-type]
    else:
      values[name] = parse_value(config[name], accepted, setting)
  return cls(**values)


def parse_value(value: Any, accepted: Any, setting: str) -> Any:
  """Checks the type of a setting.

  Args:
    value: of the setting.
    accepted: annotation of the field, such as `int | None`.
    setting: name for errors.

  Returns:
    The value; whole numbers of a float setting become floats.

  Raises:
    SettingError: the value has another type, or is not finite.
  """
  kind, is_optional = _kind(accepted)
  if value is None and is_optional:
    return None
  if kind is dict and isinstance(value, ConfigDict):
    return _with_tuples(value.to_dict())
  if kind is tuple and isinstance(value, list):
    return tuple(value)
  if kind not in (int, float):
    if not isinstance(value, kind):
      raise SettingError(setting, value, f"must be of type {kind.__name__}")
    return value
  accepted_types = (int,) if kind is int else (int, float)
  if isinstance(value, bool) or not isinstance(value, accepted_types):
    raise SettingError(setting, value, f"must be of type {kind.__name__}")
  if not math.isfinite(value):
    raise SettingError(setting, value, "must be finite")
  # x**4 and x**4.0 are different operations of XLA: a float stays a float.
  return kind(value)


def _with_tuples(value: Any) -> Any:
  """The value with tuples for lists, which JSON makes of tuples."""
  if isinstance(value, dict):
    return {name: _with_tuples(entry) for name, entry in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(_with_tuples(entry) for entry in value)
  return value


def _kind(accepted: Any) -> tuple[type[Any], bool]:
  """The class of an annotation such as `int | None`, and whether None is accepted."""
  options: Iterable[Any] = (accepted,)
  if isinstance(accepted, types.UnionType):
    options = typing.get_args(accepted)
  kinds = [typing.get_origin(o) or o for o in options if o is not types.NoneType]
  return kinds[0], len(kinds) < len(tuple(options))


def to_config(settings: Any) -> ConfigDict:
  """A ConfigDict with the fields of a group; a field that may be None is typed."""
  config = ConfigDict()
  types_of = typing.get_type_hints(type(settings))
  for name, accepted in types_of.items():
    value = getattr(settings, name)
    if dataclasses.is_dataclass(value):
      config[name] = to_config(value)
      continue
    kind, is_optional = _kind(accepted)
    if is_optional:
      config[name] = placeholder(kind)
      if value is not None:
        config[name] = value
    else:
      config[name] = ConfigDict(value) if kind is dict else value
  return config


def known_settings(
  saved: Mapping[str, Any], settings: Any, prefix: str
) -> tuple[dict[str, Any], list[str]]:
  """The saved settings that this version has, and the names of the others."""
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
