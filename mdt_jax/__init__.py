"""Masked Diffusion Transformers in JAX and Flax."""

from mdt_jax.errors import SettingError
from mdt_jax.models.presets import MODELS, create_model

__version__ = "0.1.0"
__all__ = ["MODELS", "SettingError", "__version__", "create_model"]
