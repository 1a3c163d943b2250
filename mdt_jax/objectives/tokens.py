"""Objectives of one pass in which blocks see only a part of the tokens.

`TokenObjective` chooses how many tokens a step keeps. Its subclasses, one per method,
compute the loss. The share of removed tokens may change over the run; each number of
kept tokens compiles its own program.
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError, check_choice, check_number
from mdt_jax.models.embeddings import patchify
from mdt_jax.models.flops import forward_flops
from mdt_jax.models.masking import TokenMask
from mdt_jax.models.registry import Model
from mdt_jax.objectives.objective import Apply, Draws, Losses, Objective
from mdt_jax.types import Array, Params

MAX_LENGTHS = 1_024  # as config.masking.num_lengths


def _power_cosine(power: int) -> Callable[[float], float]:
  return lambda progress: math.cos(math.pi / 2 * progress) ** power


# Name -> function of the progress in [0, 1] that is 1 at the largest share of removed
# tokens and 0 at the smallest, as in MaskDiT's released code. "linear" begins at the
# smallest share, the others at the largest.
SCHEDULES: dict[str, Callable[[float], float]] = {
  "constant": lambda progress: 1.0,
  **{f"cosine{power}": _power_cosine(power) for power in (2, 3, 4, 5, 6)},
  "exp": lambda progress: math.exp(-7 * progress),
  "linear": lambda progress: progress,
}


def scheduled_ratio(
  schedule: str, progress: float, ratio: float, min_ratio: float
) -> float:
  """Computes the share of removed tokens at a point of the run.

  Args:
    schedule: a key of SCHEDULES.
    progress: share of the run that is done, in [0, 1].
    ratio, min_ratio: largest and smallest share; "constant" ignores the smallest.
  """
  if schedule == "constant":
    return ratio
  return min_ratio + (ratio - min_ratio) * SCHEDULES[schedule](progress)


class TokenObjective(Objective):
  """Base class: one pass of a network that receives a token mask.

  A subclass defines `name`, `default_ratio` and `token_losses`, and may override
  `averages_kept` and `check_model`.

  Args:
    model: the network. Its `num_kept` and `token_mask` define the masks.
    process, timestep_sampler: see `Objective`.
    ratio: share of removed tokens, in [0, 1); with a schedule, the largest share. None:
      that of the paper's runs, `default_ratio`.
    schedule: a key of SCHEDULES; how the share changes over the run.
    min_ratio: the smallest share of a schedule, in [0, ratio]; 0 for "constant".
    num_lengths: largest number of shares of a schedule, and so of compilations; in
      [2, MAX_LENGTHS].
    num_steps: steps of the run, at whose end a schedule ends; needed unless the
      schedule is "constant".

  Raises:
    SettingError: a value is out of range, no token would be kept, or the network or the
      process does not fit.
  """

  name: ClassVar[str]
  default_ratio: ClassVar[float] = 0.5
  # Whether the loss of the process is averaged over the kept tokens only.
  averages_kept: ClassVar[bool] = False

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
    *,
    ratio: float | None = None,
    schedule: str = "constant",
    min_ratio: float = 0.0,
    num_lengths: int = 8,
    num_steps: int | None = None,
  ):
    super().__init__(model, process, timestep_sampler)
    self.check_model()
    if self.averages_kept:
      check_takes_mean(self.name, process)
    ratio = self.default_ratio if ratio is None else ratio
    check_choice("schedule", schedule, SCHEDULES)
    check_number("ratio", ratio)
    check_number("min_ratio", min_ratio)
    length = model.num_tokens
    if not (0 <= ratio < 1 and model.num_kept(ratio) >= 1):
      accepted = f"must be at least 0, and keep at least 1 of the {length} tokens"
      raise SettingError("ratio", ratio, accepted)
    if not 0 <= min_ratio <= ratio:
      raise SettingError("min_ratio", min_ratio, f"must lie in [0, ratio = {ratio:g}]")
    if min_ratio and schedule == "constant":
      raise SettingError("min_ratio", min_ratio, "must be 0 for the schedule constant")
    is_count = isinstance(num_lengths, int) and not isinstance(num_lengths, bool)
    if not is_count or not 2 <= num_lengths <= MAX_LENGTHS:
      accepted = f"must be a whole number in [2, {MAX_LENGTHS}]"
      raise SettingError("num_lengths", num_lengths, accepted)
    if schedule != "constant" and num_steps is None:
      raise SettingError("num_steps", None, f"must be given for {schedule}")
    self._schedule, self._num_steps = schedule, num_steps or 1
    self._largest, self._smallest = ratio, min_ratio
    count = 1 if schedule == "constant" else num_lengths
    self._ratios = np.linspace(ratio, min_ratio, count)

  @property
  def static_choices(self) -> Sequence[Hashable]:
    """The possible numbers of kept tokens, increasing."""
    return tuple(sorted({self.model.num_kept(float(r)) for r in self._ratios}))

  def choose_static(self, seed: int, step: int) -> Hashable:
    """Returns the number of kept tokens of a step; `seed` is ignored."""
    del seed
    progress = min(step / self._num_steps, 1.0)
    ratio = scheduled_ratio(self._schedule, progress, self._largest, self._smallest)
    nearest = self._ratios[np.abs(self._ratios - ratio).argmin()]
    return self.model.num_kept(float(nearest))

  def is_unmasked(self, static: Hashable) -> bool:
    """Whether all tokens are kept."""
    return static == self.model.num_tokens

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a step: three times those of the forward pass."""
    assert isinstance(static, int)
    return 3 * forward_flops(self.model, self._num_keep(static))

  @property
  def summary(self) -> str:
    """The numbers of kept tokens, for the log."""
    shown = ", ".join(map(str, self.static_choices))
    return f"kept tokens {shown} of {self.model.num_tokens}"

  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Array, Losses]:
    """Computes the loss; `static` is the number of kept tokens."""
    assert isinstance(static, int)
    num_keep = self._num_keep(static)
    mask = None
    if num_keep is not None:
      mask = self.model.token_mask(draws.mask_noise, num_keep)
    losses = self.token_losses(apply, params, draws, mask)
    return (losses["total"] * draws.weights).mean(), losses

  def unmasked_loss(
    self, apply: Apply, params: Params, draws: Draws
  ) -> tuple[Array, Losses]:
    """Computes the loss with all tokens."""
    losses = self.token_losses(apply, params, draws, None)
    return (losses["total"] * draws.weights).mean(), losses

  @abc.abstractmethod
  def token_losses(
    self, apply: Apply, params: Params, draws: Draws, mask: TokenMask | None
  ) -> Losses:
    """Computes the losses of each sample, including "total".

    Args:
      apply, params, draws: see `loss`.
      mask: the kept tokens; None for all tokens.
    """

  def check_model(self) -> None:
    """Raises SettingError if the network does not fit the objective."""

  def refuse_model(self, accepted: str) -> SettingError:
    """Returns the error of a network that does not fit."""
    name = getattr(self.model, "variant", type(self.model).__name__)
    return SettingError("objective", self.name, f"{name} {accepted}")

  def _num_keep(self, static: int) -> int | None:
    """The number of kept tokens, or None if all are kept."""
    return static if static < self.model.num_tokens else None


def check_takes_mean(objective: str, process: Process) -> None:
  """Raises SettingError if the losses of a process have no argument `mean`.

  Args:
    objective: name of the objective, for the error.
    process: the process, which may be the user's own.
  """
  parameters = inspect.signature(process.training_losses).parameters.values()
  if any(p.name == "mean" or p.kind is p.VAR_KEYWORD for p in parameters):
    return
  accepted = (
    f"its training_losses must accept the argument mean: {objective} averages the loss "
    "over the kept tokens; see mdt_jax.diffusion.Process.training_losses"
  )
  raise SettingError("process", type(process).__name__, accepted)


def mean_over(
  tokens: Bool[Array, "B L"], patch_size: int
) -> Callable[[Array], Float[Array, " B"]]:
  """Returns a function that averages (B, H, W, C) over the pixels of some tokens."""
  return lambda x: masked_mean(patchify(x, patch_size).mean(-1), tokens)


def masked_mean(
  values: Float[Array, "B L"], tokens: Bool[Array, "B L"]
) -> Float[Array, " B"]:
  """Averages the values (B, L) of some tokens of each sample."""
  return jnp.where(tokens, values, 0).sum(1) / tokens.sum(1)
