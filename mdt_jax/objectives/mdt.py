"""The objective of MDT (arXiv 2303.14389): an unmasked pass and a masked pass.

Both passes use the same latents and the same times t. Each pass has its own noise and
its own dropped labels. The number of tokens kept in the masked pass is drawn on the
host, because the number determines shapes. Each process of a released run draws a
number of its own; `groups` comes close to that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError
from mdt_jax.models.flops import train_flops
from mdt_jax.models.masking import KeptLengths, spread_lengths, token_mask_from_noise
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
    groups: equal parts of the batch, each of which keeps its own number of tokens, see
      `masking.spread_lengths`. 1: all images keep the number drawn for the step.

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
    groups: int = 1,
  ):
    super().__init__(model, process, timestep_sampler)
    check_masking(ratio, width, num_lengths, multiple, groups)
    if ratio == width == 0:
      raise SettingError(
        "ratio",
        ratio,
        "masks nothing: config.objective.name = 'mdt_unmasked' has two unmasked "
        "passes, 'plain' has one",
      )
    check_takes_mask("mdt", model)
    self._lengths = KeptLengths.create(
      model.num_tokens, ratio, width, num_lengths, multiple
    )
    self._spread: tuple[int, ...] = ()
    if groups > 1:
      self._spread = spread_lengths(model.num_tokens, ratio, width, groups)
    self.groups = groups
    if min(*self._lengths.lengths, *self._spread, model.num_tokens) < 1:
      raise SettingError(
        "ratio", ratio, f"must keep at least 1 of the {model.num_tokens} tokens"
      )

  @property
  def static_choices(self) -> tuple[Hashable, ...]:
    """The possible numbers of tokens kept in the masked pass, increasing.

    With groups, the only choice is the tuple of their numbers.
    """
    return (self._spread,) if self._spread else self._lengths.lengths

  def choose_static(self, seed: int, step: int) -> Hashable:
    """Draws the number of tokens of each image that the masked pass of a step keeps.

    It depends only on (seed, step), and is one of `static_choices`: the argument
    `static` of `loss`.
    """
    return self._spread or self._lengths.draw(seed, step)

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a step, on average over the groups."""
    lengths = _as_lengths(static)
    return sum(train_flops(self.model, length) for length in lengths) / len(lengths)

  @property
  def summary(self) -> str:
    """Lists the possible numbers of kept tokens, for the log."""
    shown = ", ".join(map(str, self._spread or self._lengths.lengths))
    return f"kept tokens {shown}" + (" in each step" if self._spread else "")

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the sum of both losses; `static` is one of `static_choices`."""
    losses = self.pass_losses(apply, params, draws, 0)
    masked = self._masked_losses(apply, params, draws, _as_lengths(static))
    total = losses["loss"] + masked["loss"]
    losses |= {f"masked_{name}": loss for name, loss in masked.items()}
    return (total * draws.weights).mean(), {**losses, "total": total}

  def _masked_losses(
    self, apply: Apply, params: Params, draws: Draws, lengths: tuple[int, ...]
  ) -> Losses:
    """Computes the losses of the masked pass; group i keeps `lengths[i]` tokens."""
    count = len(lengths)
    losses = []
    for group, length in enumerate(lengths):
      # Every count-th image, so that each device holds a part of each group.
      part = draws if count == 1 else _every(draws, group, count)
      mask = token_mask_from_noise(part.mask_noise, length)
      losses.append(self.pass_losses(apply, params, part, 1, mask))
    if count == 1:
      return losses[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts, 1).reshape(-1), *losses)


def _as_lengths(static: Hashable) -> tuple[int, ...]:
  """Returns the numbers of kept tokens that a value of `static_choices` stands for."""
  lengths: Any = static if isinstance(static, tuple) else (static,)
  assert all(isinstance(length, int) for length in lengths)
  return lengths


def _every(draws: Draws, first: int, step: int) -> Draws:
  """Returns images first, first + step, first + 2 step, … of `draws`."""
  # A slice with a step would move images between devices.
  return jax.tree.map(lambda a: a.reshape(-1, step, *a.shape[1:])[:, first], draws)


def check_takes_mask(objective: str, model: Model) -> None:
  """Raises SettingError if the network does not predict masked tokens."""
  if not model.takes_mask:
    name = getattr(model, "variant", type(model).__name__)
    own = model.default_objective
    others = "plain" if own == "plain" else f"plain or {own}"
    accepted = f"{name} predicts no masked tokens; accepted is {others}"
    raise SettingError("objective", objective, accepted)


def check_masking(
  ratio: float, width: float, num_lengths: int, multiple: int, groups: int
) -> None:
  """Raises SettingError for the first setting that is out of range."""
  if not 0 <= ratio <= MAX_MASK_RATIO:
    raise SettingError("ratio", ratio, f"must lie in [0, {MAX_MASK_RATIO}]")
  if not 0 <= width <= 1 or ratio + width > MAX_MASK_RATIO:
    largest = f"{MAX_MASK_RATIO - ratio:g}"
    raise SettingError(
      "width", width, f"must lie in [0, {MAX_MASK_RATIO} - ratio = {largest}]"
    )
  counts = {"num_lengths": num_lengths, "multiple": multiple, "groups": groups}
  for name, value in counts.items():
    if value < 1:
      raise SettingError(name, value, "must be at least 1")
  if groups > 1 and width == 0:
    raise SettingError("groups", groups, "must be 1: width = 0 has one mask ratio")


OBJECTIVES["mdt"] = MDTObjective
