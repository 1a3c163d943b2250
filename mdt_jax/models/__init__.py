"""Networks: MDT v1, MDTv2 and DiT."""

from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import MODELS, create_model

__all__ = ["MDT", "MODELS", "create_model"]
