"""Conditions other than labels in files of weights.

The released code has no layers for vectors and tokens, and so no names for their
parameters. Files of this package hold them beside the released tensors, whole, under
the path of this package: "blocks/cross_attention/query/kernel", with its axis of
layers, is the tensor "condition.blocks.cross_attention.query.kernel". The notes of the
file hold the arguments of `create_condition`:

  "condition": {"name": "label+vector", "vector": "clip", "vector_size": 768}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdt_jax.errors import SettingError, one_line
from mdt_jax.models.array_conditions import (
  JointCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.condition_registry import create_condition
from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.models.registry import NETWORKS, Model, abstract_params
from mdt_jax.pretrained.tensors import flatten

NOTE = "condition"  # name in the notes of a file
# Files hold these, alone or joined. For a condition of a reader's own, others lack the
# code.
STORED = (LabelCondition, VectorCondition, TokensCondition)


def is_stored(condition: Condition | None) -> bool:
  """Whether files hold a condition: None for the network's own, or one of STORED."""
  if condition is None:
    return True
  parts = condition.parts if type(condition) is JointCondition else (condition,)
  return all(type(part) in STORED for part in parts)


def tensor_name(path: str) -> str:
  """Returns the name of the tensor of a parameter that the released code lacks."""
  return f"{NOTE}.{path.replace('/', '.')}"


def own_paths(model: Model) -> frozenset[str]:
  """Returns the paths of the parameters that the released code lacks."""
  if model.condition is None:
    return frozenset()
  with_labels = abstract_params(model.clone(condition=None))
  return frozenset(flatten(abstract_params(model)).keys() - flatten(with_labels).keys())


def has_labels(note: Mapping[str, Any] | None) -> bool:
  """Whether a file holds a table of labels, by its note on the condition."""
  return note is None or "label" in str(note.get("name")).split("+")


def condition_of(
  note: Mapping[str, Any], attributes: Mapping[str, Any], source: str
) -> Condition:
  """Returns the condition that a file notes.

  Args:
    note: arguments of `create_condition`, of any types.
    attributes: the other attributes of the network.
    source: name of the file in errors.

  Raises:
    SettingError: setting "tensors": the note describes no condition.
  """
  module = NETWORKS[attributes["variant"]].module
  arguments = {
    "num_classes": attributes["num_classes"],
    "dropout": attributes.get("label_dropout", module.label_dropout),
    "null": module.null_label,
  }
  try:
    condition = create_condition(**{**note, **arguments})
    for name, default in _types_of(condition).items():
      if type(note.get(name, default)) is not type(default):
        raise TypeError(f"{name} = {note[name]!r}")
  except (TypeError, ValueError, OverflowError) as error:  # values of other types too
    accepted = f"notes a condition that cannot be built: {one_line(error)}"
    raise SettingError("tensors", source, accepted) from None
  if not is_stored(condition):
    name = str(note.get("name"))
    accepted = f"notes the condition {name!r}, which is not one of this package"
    raise SettingError("tensors", source, accepted)
  return condition


def _types_of(condition: Condition) -> dict[str, Any]:
  """Returns name of an argument -> a value of its type."""
  parts = condition.parts if isinstance(condition, JointCondition) else (condition,)
  types: dict[str, Any] = {}
  for part in parts:
    if isinstance(part, VectorCondition):
      types |= {"vector": "", "vector_size": 0, "vector_norm": True}
    if isinstance(part, TokensCondition):
      types |= {"tokens": "", "tokens_length": 0, "tokens_size": 0}
  return types
