"""The config of the tests of faults: a small run whose state has every part."""

from ml_collections import ConfigDict

from tests.training.tiny import tiny_dit_config


def get_config() -> ConfigDict:
  return tiny_dit_config(
    **{
      "num_steps": 30,
      "timestep_sampler": "loss-second-moment",
      "ema_decays": (0.9, 0.99),
      "data.flip": True,
      "log_every": 1,
      "checkpoint_every": 5,
      "checkpoints_to_keep": 3,
      "grace_seconds": 60.0,
    }
  )
