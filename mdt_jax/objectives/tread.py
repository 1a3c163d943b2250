"""The objective of TREAD (arXiv 2501.04765): one pass, in which tokens skip blocks.

The blocks of the network's route see a random part of the tokens. The loss is that of
all tokens. The source is CompVis/tread (routing_module.py, edm.py, rf.py).
"""

from __future__ import annotations

from collections.abc import Hashable

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError, check_number
from mdt_jax.models.flops import forward_flops
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.registry import Model
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Params


class TREADObjective(Objective):
  """The loss of one pass of a network with a route.

  Args:
    model: a network with a route, such as `models.tread.TREAD`.
    process, timestep_sampler: see `Objective`.
    ratio: share of the tokens that skip the blocks of the route, in [0, 1): of L
      tokens, L - int(L ratio) are kept, as in the released code. 0: the loss of DiT.

  Raises:
    SettingError: the network has no route, `ratio` is out of range, or no token would
      be kept.
  """

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
    *,
    ratio: float = 0.5,
  ):
    super().__init__(model, process, timestep_sampler)
    if not model.has_route:
      name = getattr(model, "variant", type(model).__name__)
      raise SettingError("objective", "tread", f"{name} has no route; use a TREAD")
    check_number("ratio", ratio)
    length = model.num_tokens
    self._kept = length - int(length * ratio)
    if not (ratio >= 0 and self._kept >= 1):
      accepted = f"must be at least 0, and keep at least 1 of the {length} tokens"
      raise SettingError("ratio", ratio, accepted)

  @property
  def static_choices(self) -> tuple[Hashable, ...]:
    """The number of tokens that the blocks of the route see."""
    return (self._kept,)

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a step: three times those of the forward pass."""
    assert isinstance(static, int)
    return 3 * forward_flops(self.model, static)

  @property
  def summary(self) -> str:
    """The number of kept tokens, for the log."""
    return f"kept tokens {self._kept} on the route"

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the loss of all tokens; `static` is the number of kept tokens."""
    assert isinstance(static, int)
    mask = None
    if static < self.model.num_tokens:
      mask = token_mask_from_noise(draws.mask_noise, static)
    losses = self.pass_losses(apply, params, draws, 0, mask)
    total = losses["loss"]
    return (total * draws.weights).mean(), {**losses, "total": total}


OBJECTIVES["tread"] = TREADObjective
