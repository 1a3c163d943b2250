"""A custom objective needs one file and one registration."""

from __future__ import annotations

import pytest

from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.objectives import OBJECTIVES, Objective
from tests.seams.digits import assert_learns, train_losses
from tests.training.tiny import tiny_config


class MaskedOnlyObjective(Objective):
  """A single pass, which is masked in every other step."""

  def __init__(self, model, process, timestep_sampler=None, *, keep: float = 0.5):
    super().__init__(model, process, timestep_sampler)
    self.num_keep = int(model.num_tokens * keep)

  @property
  def static_choices(self):
    return (self.num_keep, None)

  def choose_static(self, seed, step):
    return self.static_choices[step % 2]

  def loss(self, apply, params, draws, static):
    mask = None if static is None else token_mask_from_noise(draws.mask_noise, static)
    losses = self.pass_losses(apply, params, draws, 0, mask)
    total = losses["loss"]
    return (total * draws.weights).mean(), {**losses, "total": total}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(OBJECTIVES, "masked_only", MaskedOnlyObjective)


def test_custom_objective_trains_on_digits(tmp_path):
  assert_learns(train_losses(tmp_path, **{"objective.name": "masked_only"}))


def test_custom_objective_gets_its_arguments_from_the_config():
  from mdt_jax.experiment import build

  config = tiny_config(**{"objective.name": "masked_only"})
  config.objective.arguments = {"keep": 0.25}
  assert build(config).objective.static_choices == (4, None)
