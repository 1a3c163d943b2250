"""Other settings of sampling than those of the run."""

from __future__ import annotations

import pytest

from mdt_jax.errors import SettingError
from mdt_jax.sampling.overrides import with_sampling
from tests.training.tiny import tiny_config


def test_settings_are_taken_over_into_a_copy():
  config = tiny_config()
  assert with_sampling(config, {"num_steps": 2}).sampling.num_steps == 2
  assert config.sampling.num_steps == 3


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_the_devices_of_the_training_are_not_asked_for(axis):
  with_sampling(tiny_config(**{f"mesh.{axis}": 2}), {})


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("steps", 5, "steps = 5: is no setting of sampling: cfg_channels, "),
    ("num_steps", 5.5, r"config\.sampling\.num_steps = 5\.5: must be of type int"),
    ("num_steps", None, r"config\.sampling\.num_steps = None: must be of type int"),
    ("spacing", 3, r"config\.sampling\.spacing = 3: must be of type str"),
    ("eta", float("nan"), r"config\.sampling\.eta = nan: must be finite"),
    ("ema_decay", 0.9, "= 0.9: is chosen when a checkpoint is loaded: by --ema_decay"),
    ("method", "plms", r"config\.sampling\.method = 'plms': accepted are"),
  ],
)
def test_what_cannot_be_sampled_with_is_named(name, value, message):
  with pytest.raises(SettingError, match=message):
    with_sampling(tiny_config(), {name: value})
