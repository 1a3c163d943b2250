"""Which networks `adaptation` fits to each other, and the order of their blocks.

FAMILIES holds one entry for each variant of `MDT` and of its subclasses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from mdt_jax.models.array_conditions import ArrayCondition
from mdt_jax.models.conditions import LabelCondition
from mdt_jax.models.mdt import MDT

# Attributes that must be equal in any two networks.
COMMON = ("hidden_size", "num_heads", "mlp_ratio")
PARTIAL = "; --config.init.partial=true"


class Misfit(NamedTuple):
  """Why a network does not fit another one.

  Attributes:
    problem: completes "does not fit: … here".
    remedy: what the user can do; empty if nothing helps.
  """

  problem: str
  remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
  """The rules of a variant.

  Attributes:
    stacks: network -> {name of a stack: number of its blocks}, in the order of the
      forward pass.
    must_match: attributes that must be equal in two networks of this variant, also if
      only a part of the old network is kept.
    depths: attributes that must be equal in two networks of this variant, unless only a
      part of the old network is kept.
    is_alone: whether networks of this variant fit no other variant, not even in part.
    to_others, from_others: why a network of this variant starts, or is started by,
      another variant only in part; None if it does so as a whole. The problem may hold
      {old} and {new}, the variants.
    own_part: name of the part that other variants lack, in the notes on its parameters.
  """

  stacks: Callable[[Any], dict[str, int]]
  must_match: tuple[str, ...] = ()
  depths: tuple[str, ...] = ("depth",)
  is_alone: bool = False
  to_others: Misfit | None = None
  from_others: Misfit | None = None
  own_part: str = "the side-interpolater"


def _stacks_of_dit(model: Any) -> dict[str, int]:
  return {"blocks": model.depth}


def _stacks_of_mdt(model: Any) -> dict[str, int]:
  encoder_depth = model.depth - model.decode_depth
  return {"blocks": encoder_depth, "decode_blocks": model.decode_depth}


def _stacks_of_mdtv2(model: Any) -> dict[str, int]:
  half = (model.depth - model.decode_depth) // 2
  return {"in_blocks": half, "out_blocks": half, "decode_blocks": model.decode_depth}


def _stacks_of_maskdit(model: Any) -> dict[str, int]:
  return {"blocks": model.depth, "decode_blocks": model.decode_depth}


def _stacks_of_sprint(model: Any) -> dict[str, int]:
  return {
    "encoder_blocks": model.encoder_depth,
    "middle_blocks": model.middle_depth,
    "decode_blocks": model.decode_depth,
  }


_DIT = Family(_stacks_of_dit)
_NAMES_DIFFER = "the network is {old} there and {new}"
_NO_MIXER = Misfit(_NAMES_DIFFER, f"{PARTIAL} keeps what both have, all but the mixer")
_NO_SKIPS = Misfit(
  "{old} has long skips there, and {new} has none",
  f"{PARTIAL} drops them, and what the network has learned suffers",
)
_OWN_VARIANT = Misfit(_NAMES_DIFFER, f"{PARTIAL} keeps what both have")

# Variant -> its rules.
FAMILIES: dict[str, Family] = {
  "DiT": _DIT,
  "SiT": _DIT,
  "TREAD": _DIT,
  "MDT": Family(_stacks_of_mdt, depths=("depth", "decode_depth")),
  "MDTv2": Family(
    _stacks_of_mdtv2, depths=("depth", "decode_depth"), to_others=_NO_SKIPS
  ),
  "MicroDiT": Family(
    _stacks_of_dit,
    must_match=("mixer_depth", "mixer_width", "mixer_heads"),
    to_others=_NO_MIXER,
    from_others=_NO_MIXER,
    own_part="the mixer",
  ),
  "MaskDiT": Family(
    _stacks_of_maskdit,
    must_match=("depth", "decode_depth", "decoder_hidden_size", "decoder_num_heads"),
    is_alone=True,
  ),
  # Its blocks before, between and after the middle blocks differ in role.
  "SPRINT": Family(
    _stacks_of_sprint,
    must_match=("depth", "encoder_depth", "decode_depth"),
    is_alone=True,
  ),
}


def family_of(model: MDT) -> Family:
  """Returns the rules of a network.

  A user's own variant has the rules of its base class, but starts, and is started by,
  other variants only in part.
  """
  if model.variant in FAMILIES:
    return FAMILIES[model.variant]
  bases = (name for cls in type(model).__mro__ for name in getattr(cls, "variants", ()))
  base = next(FAMILIES[name] for name in bases if name in FAMILIES)
  return dataclasses.replace(base, to_others=_OWN_VARIANT, from_others=_OWN_VARIANT)


def blocks_in_order(model: MDT) -> list[tuple[str, int]]:
  """(stack, index in the stack) of each block, in the order of the forward pass."""
  stacks = family_of(model).stacks(model)
  return [(stack, i) for stack, count in stacks.items() for i in range(count)]


def find_misfit(old: MDT, new: MDT, partial: bool) -> Misfit | None:
  """Returns why the blocks of the old network do not fit the new one; None if they do.

  Args:
    old, new: the networks.
    partial: whether a part of the old network may be kept.
  """
  of_old, of_new = family_of(old), family_of(new)
  differ = old.variant != new.variant
  if differ and (of_old.is_alone or of_new.is_alone):
    return _named(Misfit(_NAMES_DIFFER), old, new)
  must_match = (*COMMON, *(() if differ else of_new.must_match))
  if not (_is_adaptable(old) and _is_adaptable(new)):
    must_match += ("condition",)
  if difference := _difference(old, new, must_match):
    return Misfit(difference)
  if partial:
    return None
  depths = ("depth",) if differ else of_new.depths
  if difference := _difference(old, new, depths):
    return Misfit(difference, f"{PARTIAL} keeps the blocks that both have")
  if differ and (misfit := of_new.from_others or of_old.to_others):
    return _named(misfit, old, new)
  return None


def _is_adaptable(model: MDT) -> bool:
  """Whether the parts of a network's condition start one by one."""
  return isinstance(model.conditioning, (LabelCondition, ArrayCondition))


def _named(misfit: Misfit, old: MDT, new: MDT) -> Misfit:
  """Fills the variants of the networks into the problem."""
  problem = misfit.problem.format(old=old.variant, new=new.variant)
  return misfit._replace(problem=problem)


def _difference(old: MDT, new: MDT, names: tuple[str, ...]) -> str | None:
  """Describes the first attribute that differs; None if all are equal."""
  for name in names:
    there, here = getattr(old, name), getattr(new, name)
    if there != here:
      return f"{name} is {there} there and {here}"
  return None
