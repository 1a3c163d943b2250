"""Which steps to train on: uniform, or by importance (arXiv 2102.09672, eq. 18)."""

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
  """The last losses of every step.

  Attributes:
    losses: (S, history) float32, a ring a step.
    counts: (S,) int32, losses seen.
  """

  losses: Array
  counts: Array


@dataclasses.dataclass(frozen=True)
class TimestepSampler:
  """Draws steps t with weights that leave the expected loss unchanged.

  Attributes:
    name: "uniform", or "loss-second-moment": in proportion to the root mean square
      of each step's last losses, once every step has a full history.
    process: whose times are drawn; importance takes a process of S timesteps.
    history: losses kept for a step.
    uniform_share: share of the probability that is uniform, so that every step occurs.
  """

  name: str
  process: Process
  history: int = 10
  uniform_share: float = 0.001

  def __post_init__(self):
    check_choice("timestep_sampler", self.name, SAMPLERS)
    if self.name != "uniform" and not isinstance(self.process.end_time, int):
      raise SettingError(
        "timestep_sampler", self.name, "must be uniform: this process has no timesteps"
      )

  @property
  def num_timesteps(self) -> int:
    """S, timesteps of the process."""
    return int(self.process.end_time)

  def init(self) -> LossHistory | None:
    """The state at the start; None for the uniform sampler, which has none."""
    if self.name == "uniform":
      return None
    return LossHistory(
      losses=jnp.zeros((self.num_timesteps, self.history), jnp.float32),
      counts=jnp.zeros((self.num_timesteps,), jnp.int32),
    )

  def probabilities(self, state: LossHistory | None) -> Array:
    """(S,) probability of each step."""
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
    """Times t (batch,) of the process, and weights (batch,) float32 of their losses."""
    if state is None:
      t = self.process.sample_t(key, batch)
      return t, jnp.ones((batch,), jnp.float32)
    p = self.probabilities(state)
    t = jax.random.categorical(key, jnp.log(p), shape=(batch,)).astype(jnp.int32)
    return t, 1 / (self.num_timesteps * p[t])

  def update(
    self, state: LossHistory | None, t: Array, losses: Array
  ) -> LossHistory | None:
    """Enters the losses (B,) of steps t (B,), in order."""
    if state is None:
      return None
    same = t[:, None] == t[None, :]
    earlier = jnp.tril(same, k=-1).sum(axis=1)  # of the same step in this batch
    later = jnp.triu(same, k=1).sum(axis=1)
    slot = (state.counts[t] + earlier) % self.history
    # Only the last `history` losses of a step stay; the others point outside.
    slot = jnp.where(later < self.history, slot, self.history)
    return LossHistory(
      losses=state.losses.at[t, slot].set(losses, mode="drop"),
      counts=state.counts.at[t].add(1),
    )
