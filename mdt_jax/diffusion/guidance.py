"""Classifier-free guidance, constant or with the power-cosine scale of MDT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdt_jax.types import Array

WHOLE = (0.0, 1.0)  # every timestep, as shares of T
ModelFn = Callable[[Array, Array], Array]  # x_t (B, H, W, C), t (B,) -> output


@dataclasses.dataclass(frozen=True)
class Guidance:
  """How much, where and when samples are guided; see `guided`.

  Attributes:
    scale: guidance scale w; 1 for none.
    power: of the power-cosine scale; 0 for a constant scale.
    channels: leading channels that are guided; None for all.
    interval: (low, high) of t / T, both included, within which samples are guided.
    num_timesteps: T, the network's time at full noise.
  """

  scale: float = 1.0
  power: float = 4.0
  channels: int | None = 3
  interval: tuple[float, float] = WHOLE
  num_timesteps: float = 1000

  def apply(
    self,
    network: Callable[[Array, Array, Array], Array],
    labels: Array,
    null_labels: Array,
    *,
    one_batch: bool = True,
  ) -> ModelFn:
    """A function for samplers, as `guided` makes it.

    Args:
      network: (x (B, H, W, C), t (B,), y) -> output.
      labels: conditions y to sample, with a leading axis B.
      null_labels: null conditions, of the same shape.
      one_batch: see `guided`.
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
      one_batch=one_batch,
    )


def power_cosine_scale(
  t: Array, scale: float, power: float, num_timesteps: float = 1000
) -> Array:
  """Guidance scale at original timesteps t (B,): 1 at t = T, `scale` at t = 0.

  1 + (scale - 1) (1 - cos(pi (1 - t / T)^power)) / 2, section 4.1 of the MDT paper.
  A power of 0 gives the constant `scale`.
  """
  fraction = (1 - t.astype(jnp.float32) / num_timesteps) ** power
  return 1 + (scale - 1) * (1 - jnp.cos(jnp.pi * fraction)) / 2


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
  one_batch: bool = True,
) -> ModelFn:
  """Turns a conditional network into the guided function that samplers take.

  Args:
    network: (x (B, H, W, C), t (B,), y (B,)) -> output (B, H, W, C or 2C).
    labels: (B,) classes to sample.
    null_label: label of the unconditional half; a number, or an array like `labels`.
    scale: guidance scale w; 1 leaves the unconditional half out.
    power: of the power-cosine scale; the paper's runs use 4, the demo 0.01.
    channels: how many leading channels are guided. The released code guides the
      first 3 of 4, kept from GLIDE; None guides every channel of the prediction.
    interval: (low, high), of t / T, both included: timesteps outside are not guided
      (arXiv 2404.07724), and a call without any inside runs no unconditional half.
    num_timesteps: T, the network's time at full noise.
    one_batch: whether both halves run as one batch of 2B samples, or as two calls of
      the network that do not wait for each other: faster on CPUs, where XLA leaves
      cores idle in the batched products of attention.
  """

  def conditional_fn(x: Array, t: Array) -> Array:
    return network(x, t, labels)

  if scale == 1:
    return conditional_fn
  null_labels = jnp.full_like(labels, null_label)

  def halves(x: Array, t: Array) -> tuple[Array, Array]:
    """Outputs of the network with and without the labels."""
    if not one_batch:
      return network(x, t, labels), network(x, t, null_labels)
    twice = (
      jnp.concatenate([a, b]) for a, b in ((x, x), (t, t), (labels, null_labels))
    )
    conditional, unconditional = jnp.split(network(*twice), 2)
    return conditional, unconditional

  def is_guided(t: Array) -> Array:
    low, high = (share * num_timesteps for share in interval)
    return (t >= low) & (t <= high)

  def guided_fn(x: Array, t: Array) -> Array:
    conditional, unconditional = halves(x, t)
    count = x.shape[-1] if channels is None else min(channels, x.shape[-1])
    step_scale = power_cosine_scale(t, scale, power, num_timesteps)
    if interval != WHOLE:
      step_scale = jnp.where(is_guided(t), step_scale, 1)
    step_scale = step_scale[:, None, None, None]
    base = unconditional[..., :count]
    epsilon = base + step_scale * (conditional[..., :count] - base)
    return jnp.concatenate([epsilon, conditional[..., count:]], axis=-1)

  if interval == WHOLE:
    return guided_fn
  # A sampler's call has one timestep for all its samples: one branch runs.
  return lambda x, t: jax.lax.cond(is_guided(t).any(), guided_fn, conditional_fn, x, t)
