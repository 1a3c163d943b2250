"""The interface of a diffusion process, and the registry of processes.

A process defines how data and noise are mixed and what a network's output means.
Objectives, guidance and the solvers (euler, heun, dpm++, dpm++sde) work with any
`Process`. ddpm, ddim and the variational bound need a `GaussianDiffusion`, because they
use its posterior; the samplers in time need a `continuous.ContinuousProcess`. Each
process defines its times t: integers for DDPM, real numbers for a continuous process.
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
  """Noise levels of the S steps of a sampler, in order of increasing noise.

  Attributes:
    alpha: (S,) float64 factors of the data.
    sigma: (S,) float64 factors of the noise.
    log_snr: (S,) float64, log(alpha / sigma).
  """

  alpha: np.ndarray
  sigma: np.ndarray
  log_snr: np.ndarray


def like(values: Array, x: Array) -> Array:
  """Reshapes values (B,) to (B, 1, 1, 1), to broadcast against x (B, H, W, C)."""
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def mean_flat(x: Array) -> Float[Array, " B"]:
  """Averages x over all axes but the first."""
  return x.mean(axis=tuple(range(1, x.ndim)))


class Process(abc.ABC):
  """Interface of the process x_t = alpha(t) x0 + sigma(t) noise, t in [0, end_time).

  Shapes in all methods: t (B,); x0, x_t and noise (B, H, W, C); `output`, the network's
  output, (B, H, W, C), or (B, H, W, 2C) if `learns_variance` is set.
  """

  @property
  def learns_variance(self) -> bool:
    """Whether the network returns 2C channels; the last C predict the variance."""
    return False

  @property
  @abc.abstractmethod
  def end_time(self) -> float:
    """Exclusive upper limit of the times t used in training."""

  @abc.abstractmethod
  def alpha(self, t: Array) -> Array:
    """Returns the factor of the data at times t: (B,) float32."""

  @abc.abstractmethod
  def sigma(self, t: Array) -> Array:
    """Returns the factor of the noise at times t: (B,) float32."""

  @abc.abstractmethod
  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """Returns the training target of the first C output channels: (B, H, W, C)."""

  @abc.abstractmethod
  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the x0 that an output predicts: (B, H, W, C)."""

  @abc.abstractmethod
  def sample_t(self, key: Array, batch: int) -> Array:
    """Draws times t (batch,) for a training step."""

  @property
  def end_network_time(self) -> float:
    """The time that the network receives at `end_time`; T in `guidance`."""
    return float(self.network_time(jnp.asarray([self.end_time]))[0])

  @property
  def clean_network_time(self) -> float:
    """The time that the network receives without noise."""
    return 0.0

  @property
  def default_spacing(self) -> str | None:
    """The spacing of every sampler; None for each sampler's own."""
    return None

  @property
  def noise_scale(self) -> float:
    """Standard deviation of the latents that sampling starts from."""
    return 1.0

  def time_bin(self, t: Array, count: int) -> Array:
    """Returns in which of `count` equal parts of [0, end_time) times t (B,) lie."""
    return count * t // self.end_time

  def weight(self, t: Array) -> Array:
    """Returns the weight of the squared error at times t: (B,) float32."""
    return jnp.ones(t.shape, jnp.float32)

  def network_time(self, t: Array) -> Array:
    """Returns the times (B,) that the network receives for times t of the process."""
    return t

  def q_sample(self, x0: Array, t: Array, noise: Array) -> Array:
    """Computes x_t = alpha(t) x0 + sigma(t) noise: (B, H, W, C)."""
    return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * noise

  def noise_from_x0(self, x0: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise (x_t - alpha(t) x0) / sigma(t): (B, H, W, C)."""
    return (x_t - like(self.alpha(t), x_t) * x0) / like(self.sigma(t), x_t)

  def to_noise(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise that an output predicts: (B, H, W, C)."""
    return self.noise_from_x0(self.to_x0(output, x_t, t), x_t, t)

  def to_velocity(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes v = alpha(t) noise - sigma(t) x0 from an output (arXiv 2202.00512).

    If alpha^2 + sigma^2 = 1, v is the derivative of x_t with respect to the angle
    arctan(sigma / alpha).
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
    mean: Callable[[Array], Array] = mean_flat,
  ) -> dict[str, Float[Array, " B"]]:
    """Computes the losses of each sample.

    Args:
      model_output: output of the network.
      x0, x_t, t, noise: see the class; x_t = q_sample(x0, t, noise).
      mean: averages the loss of each number (B, H, W, C) over a sample: (B,). Training
        on a part of the tokens averages over these tokens only.

    Returns:
      name -> (B,) float32. "loss" is the loss to minimise.
    """
    output = model_output.astype(jnp.float32)
    loss = self.weight(t) * mean((self.target(x0, noise, t) - output) ** 2)
    return {"loss": loss}

  def num_edit_steps(self, strength: float) -> int:
    """Number of steps of an edit, which starts from an image with added noise.

    Only for a respaced process.

    Args:
      strength: noise at the start, as a share of the process in (0, 1].
    """
    raise SettingError(
      "config.diffusion.process",
      type(self).__name__,
      "cannot edit: it must define num_edit_steps()",
    )

  def respaced(self, spacing: str, num_steps: int) -> Process:
    """Returns a process for sampling, in which t is an integer step in [0, num_steps).

    Args:
      spacing: the quantity in which the steps are evenly spaced, such as "log_snr"; ""
        for the default of the process.
      num_steps: S, number of steps.

    Raises:
      SettingError: the process does not support this spacing or number of steps.
    """
    raise SettingError(
      "config.diffusion.process",
      type(self).__name__,
      "cannot be sampled: it must define respaced() and levels()",
    )

  def levels(self) -> Levels:
    """Returns the noise levels of the steps; only for a respaced process."""
    raise SettingError(
      "config.diffusion.process", type(self).__name__, "has no steps; call respaced()"
    )


# Name -> function (**settings) -> process. Each process registers itself here.
PROCESSES: dict[str, Callable[..., Process]] = {}


def create_process(name: str = "gaussian", **settings: Any) -> Process:
  """Builds a process by name.

  Args:
    name: a key of PROCESSES, such as "gaussian".
    **settings: arguments of the process; for "gaussian", see
      `GaussianDiffusion.create`.

  Raises:
    SettingError: a name or a setting is unknown, or a value is invalid.
  """
  check_choice("process", name, PROCESSES)
  check_arguments(PROCESSES[name], settings, f"the process {name!r}")
  return PROCESSES[name](**settings)
