"""The config of a tiny run, which compiles in seconds."""

from __future__ import annotations

from ml_collections import ConfigDict

from mdt_jax.config import default_config


def tiny_config(**settings: object) -> ConfigDict:
  """Digits, a network of 24 kilobytes, 4 steps. `settings` have dotted names."""
  config = default_config()
  config.update_from_flattened_dict(
    {
      "num_steps": 4,
      "batch_size": 8,
      "model.input_size": 8,
      "model.in_channels": 1,
      "model.num_classes": 10,
      "model.patch_size": 2,
      "model.hidden_size": 16,
      "model.depth": 4,
      "model.num_heads": 2,
      "model.decode_depth": 2,
      "masking.num_lengths": 1,
      "optimizer.learning_rate": 1e-3,
      "ema_decays": (0.9,),
      "data.source": "digits",
      "data.flip": False,
      "data.num_threads": 0,
      "sampling.num_steps": 3,
      "log_every": 2,
      "log.loss_by_time_every": 0,
      "checkpoint_every": 2,
      "sample_every": 0,
      "num_samples": 4,
    }
  )
  config.update_from_flattened_dict(settings)
  return config


def tiny_dit_config(**settings: object) -> ConfigDict:
  """`tiny_config` with DiT: traced and compiled in a third of the time.

  For tests that depend on neither the network nor the masks.
  """
  return tiny_config(**{"model.name": "DiT-S/2", **settings})
