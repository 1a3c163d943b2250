"""The networks, such as MDT, DiT and TREAD; `models.registry` lists all presets."""

from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.models.maskdit import MaskDiT
from mdt_jax.models.mdt import MDT
from mdt_jax.models.network import Network, check_network
from mdt_jax.models.registry import MODELS, create_model
from mdt_jax.models.tread import TREAD

__all__ = [
  "MDT",
  "MODELS",
  "TREAD",
  "Condition",
  "LabelCondition",
  "MaskDiT",
  "Network",
  "check_network",
  "create_model",
]
