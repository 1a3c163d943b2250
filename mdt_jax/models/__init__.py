"""The networks, such as MDT, DiT and TREAD; `models.registry` lists all presets."""

from mdt_jax.models.array_conditions import (
  JointCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.conditions import CaptionCondition, Condition, LabelCondition
from mdt_jax.models.maskdit import MaskDiT
from mdt_jax.models.mdt import MDT
from mdt_jax.models.microdit import MicroDiT
from mdt_jax.models.microdit_text import MicroDiTText
from mdt_jax.models.network import Network, check_network
from mdt_jax.models.registry import MODELS, create_model
from mdt_jax.models.sprint import SPRINT
from mdt_jax.models.tread import TREAD

__all__ = [
  "MDT",
  "MODELS",
  "SPRINT",
  "TREAD",
  "CaptionCondition",
  "Condition",
  "JointCondition",
  "LabelCondition",
  "MaskDiT",
  "MicroDiT",
  "MicroDiTText",
  "Network",
  "TokensCondition",
  "VectorCondition",
  "check_network",
  "create_model",
]
