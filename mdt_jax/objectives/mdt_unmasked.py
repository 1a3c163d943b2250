"""Two unmasked passes: the control of experiments on MDT's masking.

The noise and the dropped labels differ between both passes, as in `objectives.mdt`.
The released network (masked_diffusion/models.py) masks nothing if its mask ratio is
None.
"""

from __future__ import annotations

from collections.abc import Hashable

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.models.flops import train_flops
from mdt_jax.models.registry import Model
from mdt_jax.objectives.mdt import check_takes_mask
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Params


class MDTUnmaskedObjective(Objective):
  """The sum of the losses of two unmasked passes.

  Args:
    model: a network that accepts a token mask, as for `MDTObjective`.
    process, timestep_sampler: see `Objective`.

  Raises:
    SettingError: the network does not accept a token mask.
  """

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
  ):
    super().__init__(model, process, timestep_sampler)
    check_takes_mask("mdt_unmasked", model)

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a step: twice those of one pass."""
    del static
    return 2 * train_flops(self.model)

  @property
  def summary(self) -> str:
    return "two unmasked passes"

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the sum of both losses; `static` is ignored."""
    del static
    losses = self.pass_losses(apply, params, draws, 0)
    second = self.pass_losses(apply, params, draws, 1)
    total = losses["loss"] + second["loss"]
    losses |= {f"second_{name}": loss for name, loss in second.items()}
    return (total * draws.weights).mean(), {**losses, "total": total}


OBJECTIVES["mdt_unmasked"] = MDTUnmaskedObjective
