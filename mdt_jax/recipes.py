"""The papers' runs on ImageNet 256x256: what files in configs/ share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.config import default_config
from mdt_jax.models.registry import MODELS, SIZES


def mdtv2(size: str) -> ConfigDict:
  """MDTv2-S/2, B/2, L/2 or XL/2 as released: the defaults, with its learning rate."""
  config = default_config()
  config.model.name = f"MDTv2-{size}/2"
  config.optimizer.learning_rate = 5e-4 if size == "S" else 3e-4
  return config


def mdt(size: str) -> ConfigDict:
  """MDT v1: one mask ratio, plain squared error, AdamW."""
  config = default_config()
  config.model.name = f"MDT-{size}/2"
  config.masking.width = 0.0
  config.diffusion.loss_weight = "none"
  _adamw(config, 3e-4)
  return config


def dit(size: str) -> ConfigDict:
  """DiT, the unmasked baseline (arXiv 2212.09748)."""
  config = default_config()
  config.model.name = f"DiT-{size}/2"
  config.masking.ratio = 0.0
  config.masking.width = 0.0
  config.diffusion.loss_weight = "none"
  _adamw(config, 1e-4)
  config.sampling.cfg_scale = 1.5
  config.sampling.cfg_power = 0.0  # a constant scale
  return config


def of_network(attributes: Mapping[str, Any]) -> ConfigDict:
  """The run that a released network is of, whatever its size.

  Args:
    attributes: of MDT, as `pretrained.torch_mdt.from_torch` returns them.
  """
  attributes = dict(attributes)
  variant = attributes.pop("variant")
  width = attributes["hidden_size"]
  # A network of no published size takes the recipe, and the name, of the smallest.
  size = next((s for s, known in SIZES.items() if known["hidden_size"] == width), "S")
  config = {"DiT": dit, "MDT": mdt, "MDTv2": mdtv2}[variant](size)
  name = f"{variant}-{size}/{attributes['patch_size']}"
  config.model.name = name if name in MODELS else f"{variant}-{size}/2"
  if not attributes.pop("learn_sigma"):
    config.diffusion.variance = "fixed_large"
  config.model.update(attributes)
  return config


def _adamw(config: ConfigDict, learning_rate: float) -> None:
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = learning_rate
  config.optimizer.clip_norm = 0.0
