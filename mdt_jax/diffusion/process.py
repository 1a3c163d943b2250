"""The interface of a process: how data and noise are mixed, and what an output means.

A network never sees a process, and a process never sees a network. Objectives, guidance
and the solvers (euler, heun, dpm++, dpm++sde) use the methods of `Process` alone; ddpm,
ddim, the variational bound and editing need the posterior of a `GaussianDiffusion`.
Times t are the process's own: integers for DDPM, real numbers for a continuous process.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdt_jax.errors import SettingError, check_arguments, check_choice
from mdt_jax.types import Array


class Levels(NamedTuple):
  """Noise levels of the S steps of a sampler, cleanest first; (S,) float64 each.

  Attributes:
    alpha: factor of the data.
    sigma: factor of the noise.
    log_snr: log(alpha / sigma).
  """

  alpha: np.ndarray
  sigma: np.ndarray
  log_snr: np.ndarray


class Process(abc.ABC):
  """x_t = alpha(t) x0 + sigma(t) noise, for times t in [0, end_time).

  In all methods t is (B,), x0, x_t and noise are (B, H, W, C), and `output` is what the
  network returns: (B, H, W, C), or (B, H, W, 2C) where `learns_variance` is set.
  """

  @property
  def learns_variance(self) -> bool:
    """Whether the network returns 2C channels, the last C of them for the variance."""
    return False

  @property
  @abc.abstractmethod
  def end_time(self) -> float:
    """The end of the times that training draws; exclusive."""

  @abc.abstractmethod
  def alpha(self, t: Array) -> Array:
    """Factor of the data at times t: (B,) float32."""

  @abc.abstractmethod
  def sigma(self, t: Array) -> Array:
    """Factor of the noise at times t: (B,) float32."""

  @abc.abstractmethod
  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """What the first C channels of the output are trained to equal: (B, H, W, C)."""

  @abc.abstractmethod
  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """The data that an output predicts: (B, H, W, C)."""

  @abc.abstractmethod
  def sample_t(self, key: Array, batch: int) -> Array:
    """Times of a training step: (batch,)."""

  @property
  def end_network_time(self) -> float:
    """The time that the network is given at `end_time`; T of guidance."""
    return float(self.network_time(jnp.asarray([self.end_time]))[0])

  def weight(self, t: Array) -> Array:
    """Weight of the squared error at times t: (B,) float32."""
    return jnp.ones(t.shape, jnp.float32)

  def network_time(self, t: Array) -> Array:
    """The time that the network is given for times t: (B,)."""
    return t

  def q_sample(self, x0: Array, t: Array, noise: Array) -> Array:
    """x_t from data and noise: (B, H, W, C)."""
    return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * noise

  def noise_from_x0(self, x0: Array, x_t: Array, t: Array) -> Array:
    """The noise that leads from x0 to x_t: (B, H, W, C)."""
    return (x_t - like(self.alpha(t), x_t) * x0) / like(self.sigma(t), x_t)

  def to_noise(self, output: Array, x_t: Array, t: Array) -> Array:
    """The noise that an output predicts: (B, H, W, C)."""
    return self.noise_from_x0(self.to_x0(output, x_t, t), x_t, t)

  def to_velocity(self, output: Array, x_t: Array, t: Array) -> Array:
    """alpha(t) noise - sigma(t) x0 that an output predicts (arXiv 2202.00512).

    It is the derivative of x_t by the angle arctan(sigma / alpha), where
    alpha^2 + sigma^2 = 1.
    """
    x0 = self.to_x0(output, x_t, t)
    noise = self.noise_from_x0(x0, x_t, t)
    return like(self.alpha(t), x_t) * noise - like(self.sigma(t), x_t) * x0

  def training_losses(
    self,
    model_output: Float[Array, "B H W channels"],
    x0: Float[Array, "B H W C"],
    x_t: Float[Array, "B H W C"],
    t: Array,
    noise: Float[Array, "B H W C"],
  ) -> dict[str, Float[Array, " B"]]:
    """Losses of each sample by name; "loss" (B,) is the one that training descends."""
    output = model_output.astype(jnp.float32)
    loss = self.weight(t) * mean_flat((self.target(x0, noise, t) - output) ** 2)
    return {"loss": loss}

  def respaced(self, spacing: str, num_steps: int) -> Process:
    """The process on the times of a sampler: its t counts `num_steps` steps.

    Args:
      spacing: what the steps are even in; "" for the process's own choice.
      num_steps: S.

    Raises:
      SettingError: the process has no such steps.
    """
    raise SettingError(
      "config.diffusion.process",
      type(self).__name__,
      "cannot be sampled: it defines neither respaced() nor levels()",
    )

  def levels(self) -> Levels:
    """Noise levels of the steps of a respaced process."""
    raise SettingError(
      "config.diffusion.process", type(self).__name__, "has no steps: call respaced()"
    )


def like(values: Array, x: Array) -> Array:
  """(B,) values, shaped (B, 1, 1, 1) to multiply x (B, H, W, C)."""
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def mean_flat(x: Array) -> Float[Array, " B"]:
  """Mean over all axes but the first."""
  return x.mean(axis=tuple(range(1, x.ndim)))


# Name -> what makes the process of its settings. A process registers itself here.
PROCESSES: dict[str, Callable[..., Process]] = {}


def create_process(name: str = "gaussian", **settings: Any) -> Process:
  """Builds a process by name.

  Args:
    name: "gaussian", or one that was added to PROCESSES.
    **settings: of the process; "gaussian" takes those of `GaussianDiffusion.create`.

  Raises:
    SettingError: an unknown name or setting, or a value that cannot be used.
  """
  check_choice("process", name, PROCESSES)
  check_arguments(PROCESSES[name], settings, f"the process {name!r}")
  return PROCESSES[name](**settings)
