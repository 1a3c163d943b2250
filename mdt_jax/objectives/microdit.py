"""The objective of MicroDiT (arXiv 2407.15811): one pass, the loss of the kept tokens.

The network drops random tokens after its mixer, and only the others are trained. The
source is SonyResearch/micro_diffusion. Its runs train on captions by EDM; this
objective accepts any condition and any process.
"""

from __future__ import annotations

from mdt_jax.models.masking import TokenMask
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses
from mdt_jax.objectives.tokens import TokenObjective, mean_over
from mdt_jax.types import Params


class MicroDiTObjective(TokenObjective):
  """The loss of the kept tokens of one pass, of a network such as `models.MicroDiT`.

  The loss of a token is the mean over its pixels and channels, that of a sample the
  mean over its kept tokens. With a learned variance, the term "vb" is averaged in the
  same way. `ratio` is the share of removed tokens; with a ratio of 0, the loss is that
  of the objective "plain".

  Any network that accepts a token mask is trained, but what an MDT predicts for the
  removed tokens does not count. For arguments see `TokenObjective`.
  """

  name = "microdit"
  averages_kept = True
  default_ratio = 0.75

  def check_model(self) -> None:
    """Raises SettingError if the network accepts no token mask."""
    model = self.model
    if not (model.defers_mask or model.takes_mask or model.has_route):
      raise self.refuse_model("accepts no token mask; use a MicroDiT")

  def token_losses(
    self, apply: Apply, params: Params, draws: Draws, mask: TokenMask | None
  ) -> Losses:
    """Computes the losses of the kept tokens."""
    if mask is None:
      losses = self.pass_losses(apply, params, draws, 0)
    else:
      kept = mean_over(~mask.removed, self.model.patch_size)
      losses = self.pass_losses(apply, params, draws, 0, mask, mean=kept)
    return {**losses, "total": losses["loss"]}


OBJECTIVES["microdit"] = MicroDiTObjective
