"""Builds the condition of a network by name, as `config.model.condition` does."""

from __future__ import annotations

import inspect
from typing import Any

from mdt_jax.errors import SettingError, check_choice
from mdt_jax.models.array_conditions import (
  JointCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.conditions import CONDITIONS, Condition

DROPS = ("together", "apart")


def _vector(
  *,
  dropout: float,
  vector: str = "vector",
  vector_size: int = 0,
  vector_norm: bool = True,
  **_: Any,
) -> VectorCondition:
  """Builds a `VectorCondition` from settings."""
  return VectorCondition(vector, vector_size, dropout, vector_norm)


def _tokens(
  *,
  dropout: float,
  tokens: str = "tokens",
  tokens_length: int = 0,
  tokens_size: int = 0,
  **_: Any,
) -> TokensCondition:
  """Builds a `TokensCondition` from settings."""
  return TokensCondition(tokens, tokens_length, tokens_size, dropout)


CONDITIONS |= {"vector": _vector, "tokens": _tokens}


def create_condition(
  name: str,
  *,
  num_classes: int,
  dropout: float,
  drop: str = "together",
  vector_dropout: float | None = None,
  tokens_dropout: float | None = None,
  **arguments: Any,
) -> Condition:
  """Builds a condition by name.

  Args:
    name: a key of CONDITIONS, or several joined by +, such as "label+vector".
    num_classes: number of classes. Conditions other than labels may interpret the
      number differently.
    dropout: see `Condition`.
    drop: "together": a sample loses all conditions or none. "apart": each condition is
      dropped alone.
    vector_dropout, tokens_dropout: probabilities of the conditions vector and tokens;
      None for `dropout`. Only for "apart".
    **arguments: further arguments, passed to the functions that take them: null of
      `LabelCondition`; vector, vector_size, vector_norm; tokens, tokens_length and
      tokens_size.

  Raises:
    SettingError: a name is unknown or given twice, or an argument is invalid.
  """
  names = name.split("+") if isinstance(name, str) else [name]
  for part in names:
    if not isinstance(part, str) or part not in CONDITIONS:
      check_choice("condition", name, [*CONDITIONS, "several joined by +"])
  if len(set(names)) < len(names):
    raise SettingError("condition", name, "must name each condition once")
  check_choice("drop", drop, DROPS)
  rates = {"vector": vector_dropout, "tokens": tokens_dropout}
  for part, rate in rates.items():
    setting = f"{part}_dropout"
    if rate is not None and (drop != "apart" or part not in names):
      accepted = f"must be None unless drop is apart and the condition has {part}"
      raise SettingError(setting, rate, accepted)
    if rate is not None and not 0 <= rate < 1:
      raise SettingError(setting, rate, "must lie in [0, 1)")
  parts = []
  for part in names:
    rate = rates.get(part)
    given = dict(num_classes=num_classes, dropout=dropout if rate is None else rate)
    parts.append(_call(CONDITIONS[part], {**arguments, **given}))
  if sum(part.num_tokens > 0 for part in parts) > 1:
    raise SettingError("condition", name, "must name one condition with tokens at most")
  made = parts[0] if len(parts) == 1 else JointCondition(tuple(parts), drop != "apart")
  made.check()
  return made


def _call(function: Any, arguments: dict[str, Any]) -> Condition:
  """Calls a function with the arguments that it takes."""
  parameters = inspect.signature(function).parameters
  if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
    return function(**arguments)
  return function(**{n: v for n, v in arguments.items() if n in parameters})
