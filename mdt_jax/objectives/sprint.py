"""The objective of SPRINT (arXiv 2510.21986): one pass, in which tokens skip blocks.

The middle blocks of the network see a part of the tokens. The loss is that of all
tokens. The source is snap-research/Sprint.
"""

from __future__ import annotations

import jax

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import LossHistory, TimestepSampler
from mdt_jax.errors import SettingError, check_number
from mdt_jax.models.masking import TokenMask
from mdt_jax.models.registry import Model
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses
from mdt_jax.objectives.tokens import TokenObjective
from mdt_jax.types import Array, Batch, Params

# Folded into the key of a step: a large number, because folding in a small one may give
# a key that `Objective.draw` splits off.
PATH_KEY = 251_021_986


class SPRINTObjective(TokenObjective):
  """The loss of one pass of a network with a deep path, `models.sprint.SPRINT`.

  `ratio` is the share of the tokens that skip the middle blocks. With the probability
  `path_drop`, all tokens of a sample skip them, also where the ratio is 0: guidance by
  path drop needs a network that has seen this.

  Args:
    path_drop: probability of dropping the deep path of a sample, in [0, 1).
    model, process, timestep_sampler, ratio, schedule, min_ratio, num_lengths,
      num_steps: see `TokenObjective`. The released run has a ratio of 0.75, and of 0 in
      its last phase.
  """

  name = "sprint"
  default_ratio = 0.75

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
    *,
    ratio: float | None = None,
    path_drop: float = 0.1,
    schedule: str = "constant",
    min_ratio: float = 0.0,
    num_lengths: int = 8,
    num_steps: int | None = None,
  ):
    super().__init__(
      model,
      process,
      timestep_sampler,
      ratio=ratio,
      schedule=schedule,
      min_ratio=min_ratio,
      num_lengths=num_lengths,
      num_steps=num_steps,
    )
    check_number("path_drop", path_drop)
    if not 0 <= path_drop < 1:
      raise SettingError("path_drop", path_drop, "must lie in [0, 1)")
    self._path_drop = path_drop

  def check_model(self) -> None:
    """Raises SettingError if the network has no deep path."""
    if not self.model.drops_path:
      raise self.refuse_model("has no deep path; use a SPRINT")

  def draw(
    self, key: Array, batch: Batch, loss_history: LossHistory | None = None
  ) -> Draws:
    """Draws the random numbers of a step, and the samples without a deep path."""
    draws = super().draw(key, batch, loss_history)
    path_key = jax.random.fold_in(key, PATH_KEY)
    dropped = jax.random.bernoulli(path_key, self._path_drop, draws.t.shape)
    return draws.replace(path_drop=dropped)

  def token_losses(
    self, apply: Apply, params: Params, draws: Draws, mask: TokenMask | None
  ) -> Losses:
    """Computes the losses of all tokens."""
    losses = self.pass_losses(apply, params, draws, 0, mask, path_drop=draws.path_drop)
    return {**losses, "total": losses["loss"]}


OBJECTIVES["sprint"] = SPRINTObjective
