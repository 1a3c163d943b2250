"""The objective of TREAD (arXiv 2501.04765): one pass, in which tokens skip blocks.

The blocks of the network's route see a random part of the tokens. The loss is that of
all tokens. The source is CompVis/tread (routing_module.py, edm.py, rf.py).
"""

from __future__ import annotations

from mdt_jax.models.masking import TokenMask
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses
from mdt_jax.objectives.tokens import TokenObjective
from mdt_jax.types import Params


class TREADObjective(TokenObjective):
  """The loss of one pass of a network with a route, such as `models.tread.TREAD`.

  `ratio` is the share of the tokens that skip the blocks of the route. With a ratio of
  0, a TREAD has the loss of DiT. For arguments see `TokenObjective`.
  """

  name = "tread"

  def check_model(self) -> None:
    """Raises SettingError if the network has no route."""
    if not self.model.has_route:
      raise self.refuse_model("has no route; use a TREAD")

  def token_losses(
    self, apply: Apply, params: Params, draws: Draws, mask: TokenMask | None
  ) -> Losses:
    """Computes the losses of all tokens."""
    losses = self.pass_losses(apply, params, draws, 0, mask)
    return {**losses, "total": losses["loss"]}


OBJECTIVES["tread"] = TREADObjective
