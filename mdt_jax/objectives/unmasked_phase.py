"""A last phase of training on all tokens.

MaskDiT, MicroDiT, TREAD and SPRINT train on a part of the tokens first and on all
tokens in the last steps, so that the network has seen what it sees in sampling.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from mdt_jax.diffusion.timestep_samplers import LossHistory
from mdt_jax.errors import SettingError
from mdt_jax.models.flops import train_flops
from mdt_jax.objectives.objective import Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Batch, Params

UNMASKED = "unmasked"  # the value of `static` in the last phase


class UnmaskedPhase(Objective):
  """An objective that removes no tokens from a step on.

  The random draws are those of the wrapped objective, in both phases.

  Args:
    objective: the objective of the first phase. Its `unmasked_loss` is that of the
      last phase.
    start: first step of the last phase.
  """

  def __init__(self, objective: Objective, start: int):
    super().__init__(objective.model, objective.process, objective.timestep_sampler)
    self.objective, self.start = objective, start
    self.groups = objective.groups

  @property
  def static_choices(self) -> Sequence[Hashable]:
    """The values of both phases, by increasing FLOPs if these are known.

    UNMASKED stands for each value of the first phase that removes no tokens, so that
    XLA compiles the step on all tokens once.
    """
    masked = self.objective.static_choices
    choices = [s for s in masked if not self.objective.is_unmasked(s)] + [UNMASKED]
    try:
      return sorted(choices, key=self.flops)
    except SettingError:  # a network of the user's own, without a count
      return choices

  def choose_static(self, seed: int, step: int) -> Hashable:
    """Returns UNMASKED from step `start` on, and for a step that keeps all tokens."""
    if step >= self.start:
      return UNMASKED
    static = self.objective.choose_static(seed, step)
    return UNMASKED if self.objective.is_unmasked(static) else static

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a training step on one image."""
    if static == UNMASKED:
      return train_flops(self.model)
    return self.objective.flops(static)

  @property
  def summary(self) -> str:
    """The summary of the first phase, and the first step of the last phase."""
    return f"{self.objective.summary}; all tokens from step {self.start}"

  def draw(
    self, key: Array, batch: Batch, loss_history: LossHistory | None = None
  ) -> Draws:
    """Draws the random numbers of a step; see `Objective.draw`."""
    return self.objective.draw(key, batch, loss_history)

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the loss of the phase of `static`."""
    if static == UNMASKED:
      return self.objective.unmasked_loss(apply, params, draws)
    return self.objective.loss(apply, params, draws, static)
