"""The papers' runs on ImageNet 256x256: what files in configs/ share."""

from __future__ import annotations

from ml_collections import ConfigDict

from mdt_jax.config import default_config


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


def _adamw(config: ConfigDict, learning_rate: float) -> None:
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = learning_rate
  config.optimizer.clip_norm = 0.0
