"""EDM (arXiv 2206.00364): log-normal noise levels and preconditioning.

EDM adds noise of standard deviation s to data: x = x0 + s noise. Its network F receives
c_in(s) x and ln(s) / 4, and predicts D(x) = c_skip(s) x + c_out(s) F. Here x_t is what
the network receives, c_in(s) x, and the time is t = ln(s). So alpha(t) = c_in(s) and
sigma(t) = c_in(s) s, and EDM's loss is the plain squared error of F.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess, numpy_of
from mdt_jax.diffusion.process import PROCESSES, like
from mdt_jax.errors import SettingError, check_number
from mdt_jax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class EDM(ContinuousProcess):
  """EDM's preconditioning with t = ln(s), s the standard deviation of the noise.

  Attributes:
    sigma_data: standard deviation of the data.
    p_mean, p_std: training draws ln(s) from N(p_mean, p_std^2).
    sigma_min, sigma_max: smallest and largest s of samplers.

  Raises:
    SettingError: a number is out of range.
  """

  sigma_data: float = 0.5
  p_mean: float = -1.2
  p_std: float = 1.2
  sigma_min: float = 0.002
  sigma_max: float = 80.0

  def __post_init__(self):
    check_number("p_mean", self.p_mean)
    for name in ("sigma_data", "p_std", "sigma_min", "sigma_max"):
      check_number(name, getattr(self, name), above=0)
    if not self.sigma_max > self.sigma_min:
      raise SettingError(
        "sigma_max", self.sigma_max, f"must be above sigma_min = {self.sigma_min}"
      )

  @property
  def start_time(self) -> float:
    """ln(sigma_min)."""
    return float(np.log(self.sigma_min))

  @property
  def end_time(self) -> float:
    """ln(sigma_max)."""
    return float(np.log(self.sigma_max))

  @property
  def noise_scale(self) -> float:
    """sigma(end_time): latents start as noise alone."""
    return float(self.sigma(np.array(self.end_time)))

  @property
  def log_snr_range(self) -> tuple[float, float]:
    """-ln(sigma_min) and -ln(sigma_max)."""
    return -self.start_time, -self.end_time

  @property
  def default_spacing(self) -> str:
    """EDM's, equation 5."""
    return "karras"

  def alpha(self, t: Any) -> Any:
    """Returns c_in = 1 / sqrt(s^2 + sigma_data^2)."""
    return numpy_of(t).exp(-self._log_norm(t))

  def sigma(self, t: Any) -> Any:
    """Returns c_in s."""
    return numpy_of(t).exp(t - self._log_norm(t))

  def alpha_rate(self, t: Any) -> Any:
    """Returns d alpha / dt = -alpha sigma^2."""
    return -self.alpha(t) * self.sigma(t) ** 2

  def sigma_rate(self, t: Any) -> Any:
    """Returns d sigma / dt = sigma (1 - sigma^2)."""
    return self.sigma(t) * (self.sigma_data * self.alpha(t)) ** 2

  def time_at(self, log_snr: np.ndarray) -> np.ndarray:
    """Returns -log_snr, because alpha / sigma = 1 / s."""
    return -log_snr

  def network_time(self, t: Array) -> Array:
    """Returns c_noise = ln(s) / 4."""
    return t / 4

  def sample_t(self, key: Array, batch: int) -> Array:
    """Draws t = ln(s) from N(p_mean, p_std^2)."""
    return self.p_mean + self.p_std * jax.random.normal(key, (batch,))

  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """Returns F = (x0 - c_skip x) / c_out, equation 8.

    It equals (s x0 - sigma_data^2 noise) / (sigma_data sqrt(s^2 + sigma_data^2)).
    """
    alpha, sigma = like(self.alpha(t), x0), like(self.sigma(t), x0)
    return sigma / self.sigma_data * x0 - self.sigma_data * alpha * noise

  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes D = c_skip x + c_out F, equation 7."""
    alpha, sigma = like(self.alpha(t), x_t), like(self.sigma(t), x_t)
    return self.sigma_data * (self.sigma_data * alpha * x_t + sigma * output)

  def to_noise(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise (x - D) / s."""
    alpha, sigma = like(self.alpha(t), x_t), like(self.sigma(t), x_t)
    return sigma * x_t - self.sigma_data * alpha * output

  def _log_norm(self, t: Any) -> Any:
    """log sqrt(s^2 + sigma_data^2), without overflow."""
    return numpy_of(t).logaddexp(2 * t, 2 * np.log(self.sigma_data)) / 2


PROCESSES["edm"] = EDM
