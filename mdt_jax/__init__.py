"""Masked Diffusion Transformers in JAX and Flax."""

from __future__ import annotations

from typing import Any

from mdt_jax.errors import SettingError
from mdt_jax.models.registry import MODELS, create_model

__version__ = "0.1.0"
__all__ = ["MODELS", "Pipeline", "SettingError", "__version__", "create_model"]


def __getattr__(name: str) -> Any:
  if name == "Pipeline":  # it loads Orbax, which a use of the modules does not need
    from mdt_jax.sampling.pipeline import Pipeline

    return Pipeline
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
