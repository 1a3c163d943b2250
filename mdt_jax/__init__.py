"""Masked Diffusion Transformers in JAX and Flax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mdt_jax.errors import SettingError

if TYPE_CHECKING:
  from mdt_jax.diffusion.process import create_process
  from mdt_jax.experiment import Experiment, build
  from mdt_jax.models.registry import MODELS, create_model
  from mdt_jax.objectives import create_objective
  from mdt_jax.pretrained.torch_mdt import from_torch, to_torch
  from mdt_jax.sampling.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = [
  "MODELS",
  "Experiment",
  "Pipeline",
  "SettingError",
  "__version__",
  "build",
  "create_model",
  "create_objective",
  "create_process",
  "from_torch",
  "to_torch",
]

# Name -> module, imported when first used, so that `import mdt_jax` stays fast.
_LAZY = {
  "MODELS": "mdt_jax.models.registry",
  "Experiment": "mdt_jax.experiment",
  "Pipeline": "mdt_jax.sampling.pipeline",
  "build": "mdt_jax.experiment",
  "create_model": "mdt_jax.models.registry",
  "create_objective": "mdt_jax.objectives",
  "create_process": "mdt_jax.diffusion",
  "from_torch": "mdt_jax.pretrained.torch_mdt",
  "to_torch": "mdt_jax.pretrained.torch_mdt",
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
