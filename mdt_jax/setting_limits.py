"""Largest values of settings, far above any use.

A mistyped value, such as a batch of 10**12 images, would otherwise use up the memory or
the day before anything refuses it. `settings` checks the smallest values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from mdt_jax.errors import SettingError
from mdt_jax.sizes import height_width

MAX_STEPS = 100_000  # of a process, and of a sampler
MAXIMA = {
  "config.batch_size": 1_048_576,
  "config.num_samples": 65_536,
  "config.num_strips": 1_024,
  "config.data.num_threads": 1_024,
  "config.data.num_workers": 1_024,
  "config.diffusion.num_timesteps": MAX_STEPS,
  "config.eval.batch_size": 65_536,
  "config.eval.num_images": 100_000_000,
  "config.masking.num_lengths": 1_024,
  "config.model.decode_depth": 1_000,
  "config.model.decoder_hidden_size": 65_536,
  "config.model.decoder_num_heads": 65_536,
  "config.model.depth": 1_000,
  "config.model.encoder_depth": 1_000,
  "config.model.hidden_size": 65_536,
  "config.model.in_channels": 4_096,
  "config.model.input_size": 16_384,
  "config.model.mixer_depth": 1_000,
  "config.model.mixer_hidden_size": 65_536,
  "config.model.mlp_ratio": 1_000,
  "config.model.num_classes": 10_000_000,
  "config.model.patch_bottleneck": 65_536,
  "config.model.unroll": 1_000,
}


def check_maxima(settings: Mapping[str, Any]) -> None:
  """Raises SettingError for the first setting above its largest value.

  Args:
    settings: nested dict of all settings, see `Settings.to_dict`.
  """
  flat = traverse_util.flatten_dict({"config": settings}, sep=".")
  for name, largest in MAXIMA.items():
    value: Any = flat[name]
    if name == "config.model.input_size":
      value = max(height_width(value, name))
    if value is not None and value > largest:
      raise SettingError(name, value, f"must be at most {largest:,}")
