"""The objective of MDT (arXiv 2303.14389): an unmasked pass and a masked pass.

Both passes use the same latents and the same times t. Each pass has its own noise and
its own dropped labels. The number of tokens kept in the masked pass is drawn on the
host, because the number determines shapes.
"""

from __future__ import annotations

from collections.abc import Hashable

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError
from mdt_jax.models.flops import train_flops
from mdt_jax.models.masking import KeptLengths, token_mask_from_noise
from mdt_jax.models.registry import Model
from mdt_jax.objectives.objective import OBJECTIVES, Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Params

MAX_MASK_RATIO = 0.8


class MDTObjective(Objective):
  """The sum of the losses of an unmasked pass and a masked pass.

  Args:
    model: a network that accepts a token mask.
    process, timestep_sampler: see `Objective`.
    ratio: smallest share of masked tokens, in [0, 0.8].
    width: the share lies in [ratio, ratio + width], with ratio + width at most 0.8.
    num_lengths, multiple: see `masking.KeptLengths.create`.

  Raises:
    SettingError: a value is out of range, no token would be kept, or the network does
      not accept a token mask.
  """

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
    *,
    ratio: float = 0.3,
    width: float = 0.2,
    num_lengths: int = 4,
    multiple: int = 8,
  ):
    super().__init__(model, process, timestep_sampler)
    check_masking(ratio, width, num_lengths, multiple)
    if not model.takes_mask:
      raise SettingError(
        "objective", "mdt", f"{_name(model)} accepts no mask; accepted is plain"
      )
    self.kept_lengths = KeptLengths.create(
      model.num_tokens, ratio, width, num_lengths, multiple
    )
    if self.kept_lengths.lengths[0] < 1:
      raise SettingError(
        "ratio", ratio, f"must keep at least 1 of the {model.num_tokens} tokens"
      )

  @property
  def static_choices(self) -> tuple[int, ...]:
    """The possible numbers of tokens kept in the masked pass, increasing."""
    return self.kept_lengths.lengths

  def choose_static(self, seed: int, step: int) -> int:
    """Draws the number of tokens of each image that the masked pass of a step keeps.

    It depends only on (seed, step), and is one of `static_choices`: the argument
    `static` of `loss`.
    """
    return self.kept_lengths.draw(seed, step)

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a step that keeps `static` tokens."""
    assert isinstance(static, int)
    return train_flops(self.model, static)

  @property
  def summary(self) -> str:
    """Lists the possible numbers of kept tokens, for the log."""
    return "kept tokens " + ", ".join(map(str, self.static_choices))

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the sum of both losses; `static` is the number of kept tokens."""
    assert isinstance(static, int)
    losses = self.pass_losses(apply, params, draws, 0)
    mask = token_mask_from_noise(draws.mask_noise, static)
    masked = self.pass_losses(apply, params, draws, 1, mask)
    total = losses["loss"] + masked["loss"]
    losses |= {f"masked_{name}": loss for name, loss in masked.items()}
    return (total * draws.weights).mean(), {**losses, "total": total}


def _name(model: Model) -> str:
  """Returns the variant of a network of this package, or else its class name."""
  return getattr(model, "variant", type(model).__name__)


def check_masking(ratio: float, width: float, num_lengths: int, multiple: int) -> None:
  """Raises SettingError for the first setting that is out of range."""
  if not 0 <= ratio <= MAX_MASK_RATIO:
    raise SettingError("ratio", ratio, f"must lie in [0, {MAX_MASK_RATIO}]")
  if not 0 <= width <= 1 or ratio + width > MAX_MASK_RATIO:
    largest = f"{MAX_MASK_RATIO - ratio:g}"
    raise SettingError(
      "width", width, f"must lie in [0, {MAX_MASK_RATIO} - ratio = {largest}]"
    )
  for name, value in (("num_lengths", num_lengths), ("multiple", multiple)):
    if value < 1:
      raise SettingError(name, value, "must be at least 1")


OBJECTIVES["mdt"] = MDTObjective
