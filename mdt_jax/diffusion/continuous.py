"""Processes in continuous time, and their restriction to the steps of a sampler."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.process import Levels, Process, like
from mdt_jax.diffusion.schedules import KARRAS_RHO, MIN_LOG_SNR, SPACINGS
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.types import Array

# Largest log(alpha / sigma) of the steps "log_snr" and "karras", which could not reach
# a noise of zero: about that of the first timestep of DDPM's linear schedule.
MAX_LOG_SNR = 4.6


class ContinuousProcess(Process):
  """A process with real times t in [start_time, end_time]; noise increases with t.

  alpha, sigma and their derivatives accept NumPy arrays, for tables in float64 on the
  host, and JAX arrays.
  """

  @property
  @abc.abstractmethod
  def start_time(self) -> float:
    """The time with the least noise."""

  @abc.abstractmethod
  def alpha(self, t: Any) -> Any:
    """Returns the factor of the data at times t."""

  @abc.abstractmethod
  def sigma(self, t: Any) -> Any:
    """Returns the factor of the noise at times t."""

  @abc.abstractmethod
  def alpha_rate(self, t: Any) -> Any:
    """Returns d alpha / dt at times t."""

  @abc.abstractmethod
  def sigma_rate(self, t: Any) -> Any:
    """Returns d sigma / dt at times t."""

  @abc.abstractmethod
  def time_at(self, log_snr: np.ndarray) -> np.ndarray:
    """Returns the times at which log(alpha / sigma) has given values: float64."""

  @property
  def sampling_interval(self) -> tuple[float, float]:
    """(low, high) times of the samplers in time, which may avoid singular ends."""
    return self.start_time, self.end_time

  @property
  def log_snr_range(self) -> tuple[float, float]:
    """(largest, smallest) log(alpha / sigma) of the spacings "log_snr" and "karras"."""
    clean, noisy = self.log_snr(np.array(self.sampling_interval))
    return min(clean, MAX_LOG_SNR), max(noisy, MIN_LOG_SNR)

  @property
  def clean_network_time(self) -> float:
    """The time that the network receives at `start_time`."""
    return float(self.network_time(jnp.asarray([self.start_time]))[0])

  def noise_share(self, t: Any) -> Any:
    """Returns (t - start_time) / (end_time - start_time)."""
    return (t - self.start_time) / (self.end_time - self.start_time)

  def time_bin(self, t: Array, count: int) -> Array:
    """Returns in which of `count` equal parts of the process times t (B,) lie."""
    return jnp.clip(jnp.floor(count * self.noise_share(t)), 0, count - 1)

  def log_snr(self, t: np.ndarray) -> np.ndarray:
    """Returns log(alpha / sigma) at times t; infinite at an end without noise or data.

    Args:
      t: float64 on the host.
    """
    with np.errstate(divide="ignore"):
      return np.log(self.alpha(t)) - np.log(self.sigma(t))

  def to_velocity(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes dx_t/dt of the probability flow, alpha'(t) x0 + sigma'(t) noise."""
    x0, noise = self.to_x0(output, x_t, t), self.to_noise(output, x_t, t)
    return like(self.alpha_rate(t), x_t) * x0 + like(self.sigma_rate(t), x_t) * noise

  def to_score(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the gradient of log p(x_t), -noise / sigma(t)."""
    return -self.to_noise(output, x_t, t) / like(self.sigma(t), x_t)

  def diffusion_rate(self, t: Any) -> Any:
    """Returns g(t) = sigma sigma' - sigma^2 alpha' / alpha at times t.

    The process is the forward SDE dx = (alpha' / alpha) x dt + sqrt(2 g) dw.
    """
    sigma = self.sigma(t)
    ratio = self.alpha_rate(t) / self.alpha(t)
    return sigma * self.sigma_rate(t) - sigma**2 * ratio

  def spaced_times(self, spacing: str, shares: np.ndarray) -> np.ndarray:
    """Returns the times at shares of an axis.

    Args:
      spacing: the axis: "uniform" for the time, "log_snr" for log(alpha / sigma), or
        "karras" for (sigma / alpha)^(1/7) (EDM, arXiv 2206.00364, equation 5).
      shares: (S,) increasing, in [0, 1]; 1 has the most noise.

    Raises:
      SettingError: the spacing is unknown.
    """
    check_choice("spacing", spacing, SPACINGS)
    low, high = self.sampling_interval
    if spacing == "uniform":
      return self.shifted(low + shares * (high - low))
    clean, noisy = self.log_snr_range
    if spacing == "log_snr":
      return self.time_at(clean + shares * (noisy - clean))
    roots = np.exp(-np.array([clean, noisy]) / KARRAS_RHO)
    return self.time_at(-KARRAS_RHO * np.log(roots[0] + shares * (roots[1] - roots[0])))

  def shifted(self, t: np.ndarray) -> np.ndarray:
    """Returns the times of samplers for evenly spaced times; by default the same."""
    return t

  def respaced(self, spacing: str, num_steps: int) -> TimeGrid:
    """Returns the process at the times of a sampler whose last step ends without noise.

    Args:
      spacing: see `spaced_times`; "" for "uniform".
      num_steps: S, at least 1.

    Raises:
      SettingError: the spacing is unknown, or `num_steps` is below 1.
    """
    if num_steps < 1:
      raise SettingError("num_steps", num_steps, "must be at least 1")
    spacing = spacing or "uniform"
    if spacing == "uniform":  # the last of S even steps ends at the share 0
      shares = np.arange(1, num_steps + 1) / num_steps
    else:
      shares = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)
    return TimeGrid(self, self.spaced_times(spacing, shares))


def numpy_of(t: Any) -> Any:
  """Returns numpy for numbers and arrays on the host, else jax.numpy."""
  return np if isinstance(t, np.ndarray | float | int) else jnp


@dataclasses.dataclass(frozen=True, eq=False)
class TimeGrid(Process):
  """A continuous process at S times; t is an integer step in [0, S) in all methods.

  Attributes:
    process: the continuous process.
    times: (S,) float64, increasing.
  """

  process: ContinuousProcess
  times: np.ndarray

  @property
  def learns_variance(self) -> bool:
    """As the continuous process."""
    return self.process.learns_variance

  @property
  def end_time(self) -> int:
    """S: steps lie in [0, S)."""
    return len(self.times)

  @property
  def end_network_time(self) -> float:
    """As the continuous process."""
    return self.process.end_network_time

  @property
  def clean_network_time(self) -> float:
    """As the continuous process."""
    return self.process.clean_network_time

  @property
  def noise_scale(self) -> float:
    """As the continuous process."""
    return self.process.noise_scale

  def time(self, step: Array) -> Array:
    """Returns the times (B,) float32 of steps (B,)."""
    return jnp.asarray(self.times, jnp.float32)[step]

  def alpha(self, t: Array) -> Array:
    """Returns the factor of the data at steps t: (B,) float32."""
    return jnp.asarray(self.process.alpha(self.times), jnp.float32)[t]

  def sigma(self, t: Array) -> Array:
    """Returns the factor of the noise at steps t: (B,) float32."""
    return jnp.asarray(self.process.sigma(self.times), jnp.float32)[t]

  def network_time(self, t: Array) -> Array:
    """Returns the times that the network receives at steps t."""
    return self.process.network_time(self.time(t))

  def weight(self, t: Array) -> Array:
    """Returns the weight of the squared error at steps t."""
    return self.process.weight(self.time(t))

  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """Returns the training target at steps t."""
    return self.process.target(x0, noise, self.time(t))

  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the x0 that an output predicts at steps t."""
    return self.process.to_x0(output, x_t, self.time(t))

  def to_noise(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise that an output predicts at steps t."""
    return self.process.to_noise(output, x_t, self.time(t))

  def to_velocity(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes dx_t/dt at steps t, with respect to the time of the process."""
    return self.process.to_velocity(output, x_t, self.time(t))

  def sample_t(self, key: Array, batch: int) -> Array:
    """Draws steps uniformly from [0, S)."""
    return jax.random.randint(key, (batch,), 0, len(self.times))

  def num_edit_steps(self, strength: float) -> int:
    """Number of times up to a share of the process; 2 or more, if there are."""
    shares = self.process.noise_share(self.times)
    count = int(np.count_nonzero(shares <= strength * shares[-1]))
    return min(max(2, count), len(self.times))

  def levels(self) -> Levels:
    """Returns the noise levels of the S steps, float64 on the host."""
    alpha, sigma = self.process.alpha(self.times), self.process.sigma(self.times)
    return Levels(alpha, sigma, self.process.log_snr(self.times))
