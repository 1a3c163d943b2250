"""Guidance of a strong pass by a weak pass of the network.

In classifier-free guidance, the weak pass has no condition. In sparse guidance
(arXiv 2601.01608), the weak pass sees fewer tokens. The scale is constant, or MDT's
power-cosine scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdt_jax.types import Array

WHOLE = (0.0, 1.0)  # the guidance interval of all timesteps, in units of T
ModelFn = Callable[[Array, Array], Array]  # x_t (B, H, W, C), t (B,) -> output


RATIO_SCHEDULES = ("constant", "cosine")
WEAK_CONDITIONS = ("null", "same")
NUM_RATIOS = 8  # of a schedule, each of which compiles its own pass of the network


@dataclasses.dataclass(frozen=True)
class TokenShares:
  """Shares of the tokens that the passes of guidance leave out.

  Attributes:
    strong: share that the strong pass leaves out, in [0, 1).
    weak: share that the weak pass leaves out, in [0, 1]. 1 is path-drop guidance
      (SPRINT, arXiv 2510.21986): the middle blocks see no token.
    schedule: "constant"; or "cosine": over sampling, the share of the weak pass falls
      from `weak` to 0 by half a cosine, and that of the strong pass rises from 0 to
      `strong`.
    weak_condition: condition of the weak pass: "null", or "same" as the strong pass.
  """

  strong: float = 0.0
  weak: float = 0.0
  schedule: str = "constant"
  weak_condition: str = "null"

  @property
  def are_all(self) -> bool:
    """Whether both passes see all tokens."""
    return self.strong == self.weak == 0

  def ratios(self, is_weak: bool) -> tuple[float, ...]:
    """The possible shares that a pass leaves out, increasing."""
    ratio = self.weak if is_weak else self.strong
    if self.schedule == "constant" or ratio == 0:
      return (ratio,)
    return tuple(ratio * i / (NUM_RATIOS - 1) for i in range(NUM_RATIOS))

  def choose(self, noise_share: Array, is_weak: bool) -> Array:
    """Returns which entry of `ratios` a pass uses.

    Args:
      noise_share: share of the process, in [0, 1] from no noise; any shape.
      is_weak: whether the pass is the weak one.
    """
    count = len(self.ratios(is_weak))
    height = (1 - jnp.cos(math.pi * jnp.clip(noise_share, 0, 1))) / 2
    height = height if is_weak else 1 - height
    return jnp.round((count - 1) * height).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Settings of guidance; `guided` documents the method.

  Attributes:
    scale: guidance scale w; 1 for no guidance.
    power: power of the power-cosine scale; 0 for a constant scale.
    channels: number of leading channels to guide; None for all.
    interval: (low, high) range of t / T, inclusive, in which to guide.
    num_timesteps: T, the time that the network receives at full noise.
    clean_time: time that the network receives without noise. If it is not 0, t / T
      means (t - clean_time) / (T - clean_time).
    tokens: shares of the tokens that the passes leave out, and the condition of the
      weak pass. `apply` ignores them; see `combine`.
  """

  scale: float = 1.0
  power: float = 4.0
  channels: int | None = 3
  interval: tuple[float, float] = WHOLE
  num_timesteps: float = 1000
  clean_time: float = 0.0
  tokens: TokenShares = TokenShares()

  @property
  def needs_null(self) -> bool:
    """Whether the weak pass has the null condition."""
    return self.scale != 1 and self.tokens.weak_condition == "null"

  def combine(
    self, strong: ModelFn, both: Callable[[Array, Array], tuple[Array, Array]]
  ) -> ModelFn:
    """Guides a strong pass by a weak pass.

    Args:
      strong: the strong pass alone, (x (B, H, W, C), t (B,)) -> output.
      both: (x, t) -> (output of the strong pass, output of the weak pass).

    Returns:
      The guided function (x, t) -> weak + w (strong - weak), where w is `scale_at`.
      Channels that are not guided are those of the strong pass.
    """
    if self.scale == 1:
      return strong

    def guided_fn(x: Array, t: Array) -> Array:
      output, weak = both(x, t)
      channels = x.shape[-1] if self.channels is None else self.channels
      return guide(output, weak, self.scale_at(t), min(channels, x.shape[-1]))

    if self.interval == WHOLE:
      return guided_fn
    # A sampler uses the same timestep for all samples, so only one branch runs.
    return lambda x, t: jax.lax.cond(self.is_guided(t).any(), guided_fn, strong, x, t)

  def scale_at(self, t: Array) -> Array:
    """Returns the guidance scale at times t (B,): (B,) float32; 1 is no guidance."""
    return _scale_at(
      t, self.scale, self.power, self.interval, self.num_timesteps, self.clean_time
    )

  def is_guided(self, t: Array) -> Array:
    """Whether times t (B,) lie in the interval: (B,) bool."""
    return _in_interval(t, self.interval, self.num_timesteps, self.clean_time)

  def noise_share(self, t: Array) -> Array:
    """Returns (t - clean_time) / (T - clean_time), the share of the process."""
    return _noise_share(t, self.num_timesteps, self.clean_time)

  def apply(
    self,
    network: Callable[[Array, Array, Array], Array],
    labels: Array,
    null_labels: Array,
    *,
    one_batch: bool = True,
  ) -> ModelFn:
    """Calls `guided` with these settings.

    Args:
      network: (x (B, H, W, C), t (B,), y (B, …)) -> output.
      labels: (B, …) conditions to sample.
      null_labels: null conditions, of the shape of `labels`.
      one_batch: see `guided`.

    Returns:
      The guided function (x, t) -> output.
    """
    return guided(
      network,
      labels,
      null_labels,
      scale=self.scale,
      power=self.power,
      channels=self.channels,
      interval=self.interval,
      num_timesteps=self.num_timesteps,
      clean_time=self.clean_time,
      one_batch=one_batch,
    )


def power_cosine_scale(
  t: Array,
  scale: float,
  power: float,
  num_timesteps: float = 1000,
  clean_time: float = 0.0,
) -> Array:
  """Computes the guidance scale at timestep t (MDT, arXiv 2303.14389, section 4.1).

  1 + (scale - 1) (1 - cos(pi (1 - t / T)^power)) / 2: 1 at t = T and `scale` at t = 0.
  A power of 0 gives the constant `scale`.

  Args:
    t: (B,) original timesteps.
    scale: guidance scale w.
    power: see the equation.
    num_timesteps: T.
    clean_time: see `Guidance`.

  Returns:
    (B,) float32.
  """
  noise_share = _noise_share(t, num_timesteps, clean_time)
  # Churn may raise the noise above T, where a power of the difference would be NaN.
  fraction = jnp.maximum(1 - noise_share, 0) ** power
  return 1 + (scale - 1) * (1 - jnp.cos(jnp.pi * fraction)) / 2


def _scale_at(
  t: Array,
  scale: float,
  power: float,
  interval: tuple[float, float],
  num_timesteps: float,
  clean_time: float,
) -> Array:
  """Returns the guidance scale at times t (B,): 1 outside of the interval."""
  step_scale = power_cosine_scale(t, scale, power, num_timesteps, clean_time)
  if interval != WHOLE:
    inside = _in_interval(t, interval, num_timesteps, clean_time)
    step_scale = jnp.where(inside, step_scale, 1)
  return step_scale


def guide(strong: Array, weak: Array, scale: Array, channels: int) -> Array:
  """Computes weak + scale (strong - weak).

  Args:
    strong, weak: (B, H, W, C or 2C) outputs of the two passes.
    scale: (B,) guidance scales.
    channels: number of leading channels to guide. The other channels are those of
      `strong`.
  """
  base = weak[..., :channels]
  guided = base + scale[:, None, None, None] * (strong[..., :channels] - base)
  return jnp.concatenate([guided, strong[..., channels:]], axis=-1)


def _noise_share(t: Array, num_timesteps: float, clean_time: float) -> Array:
  """Share of the process, from no noise, of times t (B,) that the network receives."""
  return (t.astype(jnp.float32) - clean_time) / (num_timesteps - clean_time)


def noise_above(
  t: Array, share: float, num_timesteps: float, clean_time: float = 0.0
) -> Array:
  """Compares times with the time at a share of the process.

  Args:
    t: (B,) times that the network receives.
    share: share of the process in [0, 1], from no noise.
    num_timesteps, clean_time: see `Guidance`.

  Returns:
    (B,) difference, above 0 where t has more noise than the time at `share`. All times
    have more noise than that at the share 0, and less than that at the share 1.
  """
  if share in (0, 1):  # also times beyond the ends, by churn or rounding
    return jnp.full(t.shape, jnp.inf if share == 0 else -jnp.inf)
  limit = clean_time + share * (num_timesteps - clean_time)
  return t - limit if num_timesteps > clean_time else limit - t


def _in_interval(
  t: Array, interval: tuple[float, float], num_timesteps: float, clean_time: float
) -> Array:
  """Whether times t (B,) lie in an interval of shares of the process."""
  low, high = (noise_above(t, share, num_timesteps, clean_time) for share in interval)
  return (low >= 0) & (high <= 0)


def guided(
  network: Callable[[Array, Array, Array], Array],
  labels: Array,
  null_label: int | Array,
  *,
  scale: float,
  power: float = 4.0,
  channels: int | None = 3,
  interval: tuple[float, float] = WHOLE,
  num_timesteps: float = 1000,
  clean_time: float = 0.0,
  one_batch: bool = True,
) -> ModelFn:
  """Turns a conditional network into a guided function for samplers.

  The guided output is u + w (c - u), where c and u are the conditional and the
  unconditional output and w is `power_cosine_scale`.

  Args:
    network: (x (B, H, W, C), t (B,), y (B, …)) -> output (B, H, W, C or 2C).
    labels: (B, …) conditions to sample, such as classes.
    null_label: null condition of the unconditional pass; a number, or an array of the
      shape of `labels`.
    scale: guidance scale; 1 skips the unconditional pass.
    power: power of the power-cosine scale. The paper uses 4, the released demo 0.01.
    channels: number of leading channels to guide; None for all C. The released code
      guides the first 3 of 4, a remnant of GLIDE.
    interval: (low, high) range of t / T, inclusive, in which to guide (arXiv
      2404.07724). A call with all timesteps outside skips the unconditional pass.
    num_timesteps, clean_time: see `Guidance`.
    one_batch: whether the two passes run as one batch of 2B samples. False: two
      independent calls, which are faster on CPUs, where XLA leaves cores idle in the
      batched products of attention.

  Returns:
    The guided function (x (B, H, W, C), t (B,)) -> output (B, H, W, C or 2C).
  """

  def conditional_fn(x: Array, t: Array) -> Array:
    return network(x, t, labels)

  if scale == 1:
    return conditional_fn
  null_labels = jnp.full_like(labels, null_label)

  def halves(x: Array, t: Array) -> tuple[Array, Array]:
    """Returns the conditional and the unconditional output."""
    if not one_batch:
      return network(x, t, labels), network(x, t, null_labels)
    twice = (
      jnp.concatenate([a, b]) for a, b in ((x, x), (t, t), (labels, null_labels))
    )
    conditional, unconditional = jnp.split(network(*twice), 2)
    return conditional, unconditional

  guidance = Guidance(scale, power, channels, interval, num_timesteps, clean_time)
  return guidance.combine(conditional_fn, halves)
