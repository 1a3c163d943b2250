"""The networks MDT v1, MDTv2, DiT and SiT; `models.registry` lists all presets."""

from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.models.mdt import MDT
from mdt_jax.models.network import Network, check_network
from mdt_jax.models.registry import MODELS, create_model

__all__ = [
  "MDT",
  "MODELS",
  "Condition",
  "LabelCondition",
  "Network",
  "check_network",
  "create_model",
]
