"""The objective of DiT (arXiv 2212.09748): one pass over all tokens."""

from __future__ import annotations

from collections.abc import Hashable

from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Params


class PlainObjective(Objective):
  """The loss of one unmasked pass of the network."""

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the loss of the unmasked pass; `static` is ignored."""
    del static
    losses = self.pass_losses(apply, params, draws, 0)
    total = losses["loss"]
    return (total * draws.weights).mean(), {**losses, "total": total}


OBJECTIVES["plain"] = PlainObjective
