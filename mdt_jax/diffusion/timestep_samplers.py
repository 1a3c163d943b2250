"""Samplers of training timesteps: uniform, or by importance.

Importance sampling follows improved DDPM (arXiv 2102.09672, equation 18).
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from mdt_jax.diffusion.process import Process
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

SAMPLERS = ("uniform", "loss-second-moment")


class LossHistory(flax.struct.PyTreeNode):
  """The most recent losses of each timestep.

  Attributes:
    losses: (S, history) float32; each row is a ring buffer.
    counts: (S,) int32, number of losses recorded so far.
  """

  losses: Array
  counts: Array


@dataclasses.dataclass(frozen=True)
class TimestepSampler:
  """Draws times t, with loss weights that keep the expected loss unchanged.

  Attributes:
    name: "uniform", or "loss-second-moment". The latter draws t with probability
      proportional to the root mean square of the recent losses at t. Until each
      timestep has `history` losses, it draws uniformly.
    process: the process whose times are drawn. "loss-second-moment" needs a process
      with S integer timesteps.
    history: number of recent losses kept per timestep.
    uniform_share: share of the probability that is uniform, so that each t can occur.

  Raises:
    SettingError: the name is unknown, or the process has no integer timesteps.
  """

  name: str
  process: Process
  history: int = 10
  uniform_share: float = 0.001

  def __post_init__(self):
    check_choice("timestep_sampler", self.name, SAMPLERS)
    if self.name != "uniform" and not isinstance(self.process.end_time, int):
      raise SettingError(
        "timestep_sampler",
        self.name,
        "must be uniform: the process has no integer timesteps",
      )

  @property
  def num_timesteps(self) -> int:
    """S, number of timesteps of the process."""
    return int(self.process.end_time)

  def init(self) -> LossHistory | None:
    """Returns the initial state; None for "uniform", which has no state."""
    if self.name == "uniform":
      return None
    return LossHistory(
      losses=jnp.zeros((self.num_timesteps, self.history), jnp.float32),
      counts=jnp.zeros((self.num_timesteps,), jnp.int32),
    )

  def probabilities(self, state: LossHistory | None) -> Array:
    """Returns the probability (S,) of each timestep."""
    uniform = jnp.full((self.num_timesteps,), 1 / self.num_timesteps)
    if state is None:
      return uniform
    scale = jnp.sqrt(jnp.mean(state.losses**2, axis=1))
    weighted = scale / scale.sum() * (1 - self.uniform_share)
    weighted += self.uniform_share / self.num_timesteps
    return jnp.where(jnp.all(state.counts >= self.history), weighted, uniform)

  def sample(
    self, key: Array, batch: int, state: LossHistory | None
  ) -> tuple[Array, Array]:
    """Draws times.

    Args:
      key: random key.
      batch: number of times.
      state: state of the sampler; None for "uniform".

    Returns:
      (t, weights): t (batch,) times of the process; weights (batch,) float32, by which
      to multiply the losses.
    """
    if state is None:
      t = self.process.sample_t(key, batch)
      return t, jnp.ones((batch,), jnp.float32)
    p = self.probabilities(state)
    t = jax.random.categorical(key, jnp.log(p), shape=(batch,)).astype(jnp.int32)
    return t, 1 / (self.num_timesteps * p[t])

  def update(
    self, state: LossHistory | None, t: Array, losses: Array
  ) -> LossHistory | None:
    """Records losses (B,) of timesteps t (B,) and returns the new state."""
    if state is None:
      return None
    same = t[:, None] == t[None, :]
    earlier = jnp.tril(same, k=-1).sum(axis=1)  # losses of the same t in this batch
    later = jnp.triu(same, k=1).sum(axis=1)
    slot = (state.counts[t] + earlier) % self.history
    # Only the last `history` losses of a t are kept. The others get an index out of
    # range, which mode="drop" ignores.
    slot = jnp.where(later < self.history, slot, self.history)
    return LossHistory(
      losses=state.losses.at[t, slot].set(losses, mode="drop"),
      counts=state.counts.at[t].add(1),
    )
