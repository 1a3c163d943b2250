"""Flow matching and stochastic interpolants (SiT, arXiv 2401.08740).

x_t = alpha(t) x0 + sigma(t) noise, with t = 0 for data and t = 1 for noise. SiT writes
the same paths with the opposite time, 1 - t; its network receives 1 - t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess, numpy_of
from mdt_jax.diffusion.process import PROCESSES, like
from mdt_jax.errors import SettingError, check_choice, check_number
from mdt_jax.types import Array

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the path "vp", as in score SDEs (arXiv 2011.13456)
MODE_SCALE = 1.29  # s of "mode" (arXiv 2403.03206, equation 20)
PREDICTIONS = ("velocity", "epsilon", "score", "x0")
LOSS_WEIGHTS = ("none", "velocity", "likelihood")
DISTRIBUTIONS = ("uniform", "logit_normal", "mode")


class Path(NamedTuple):
  """Functions of t, of NumPy or JAX arrays.

  Attributes:
    alpha, sigma: factors of the data and of the noise.
    alpha_rate, sigma_rate: their derivatives with respect to t.
    time_at: log(alpha / sigma) -> t, for NumPy arrays.
  """

  alpha: Callable[[Any], Any]
  sigma: Callable[[Any], Any]
  alpha_rate: Callable[[Any], Any]
  sigma_rate: Callable[[Any], Any]
  time_at: Callable[[np.ndarray], np.ndarray]


def _vp_log_alpha(t: Any) -> Any:
  """log alpha(t) = -(t^2 (beta_max - beta_min) / 4 + t beta_min / 2)."""
  return -(t**2 * (BETA_MAX - BETA_MIN) / 4 + t * BETA_MIN / 2)


def _vp_sigma(t: Any) -> Any:
  xp = numpy_of(t)
  return xp.sqrt(-xp.expm1(2 * _vp_log_alpha(t)))


def _vp_alpha_rate(t: Any) -> Any:
  beta = BETA_MIN + t * (BETA_MAX - BETA_MIN)
  return -beta / 2 * numpy_of(t).exp(_vp_log_alpha(t))


def _vp_sigma_rate(t: Any) -> Any:  # from alpha alpha' + sigma sigma' = 0
  alpha = numpy_of(t).exp(_vp_log_alpha(t))
  return -alpha * _vp_alpha_rate(t) / _vp_sigma(t)


def _vp_time_at(log_snr: np.ndarray) -> np.ndarray:
  """Solves t^2 (beta_max - beta_min) / 2 + t beta_min = -2 log alpha for t."""
  rate, minus_two_log_alpha = BETA_MAX - BETA_MIN, np.logaddexp(0, -2 * log_snr)
  root = np.sqrt(BETA_MIN**2 + 2 * rate * minus_two_log_alpha)
  return 2 * minus_two_log_alpha / (BETA_MIN + root)


PATHS = {
  "linear": Path(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_rate=lambda t: numpy_of(t).full_like(t, -1.0),
    sigma_rate=lambda t: numpy_of(t).full_like(t, 1.0),
    time_at=lambda log_snr: 1 / (1 + np.exp(log_snr)),
  ),
  "gvp": Path(
    # Exactly 0 at t = 1, which cos(pi t / 2) is not.
    alpha=lambda t: numpy_of(t).sin((1 - t) * (np.pi / 2)),
    sigma=lambda t: numpy_of(t).sin(t * (np.pi / 2)),
    alpha_rate=lambda t: -np.pi / 2 * numpy_of(t).sin(t * (np.pi / 2)),
    sigma_rate=lambda t: np.pi / 2 * numpy_of(t).sin((1 - t) * (np.pi / 2)),
    time_at=lambda log_snr: 2 / np.pi * np.arctan(np.exp(-log_snr)),
  ),
  "vp": Path(
    alpha=lambda t: numpy_of(t).exp(_vp_log_alpha(t)),
    sigma=_vp_sigma,
    alpha_rate=_vp_alpha_rate,
    sigma_rate=_vp_sigma_rate,
    time_at=_vp_time_at,
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Flow(ContinuousProcess):
  """A flow from noise (t = 1) to data (t = 0).

  Attributes:
    path: how data and noise are mixed. "linear": alpha = 1 - t, sigma = t. "gvp": alpha
      = cos(pi t / 2), sigma = sin(pi t / 2). "vp": the variance-preserving SDE with
      beta from 0.1 to 20.
    prediction: what the network's output means: "velocity", the derivative of x_t with
      respect to the time that the network receives; "epsilon", the noise; "score", the
      gradient of log p(x_t); or "x0".
    loss_weight: weight of the squared error. "none": 1 (for "score": sigma^2, so that
      errors are those of the noise). "velocity": the loss is that of the velocity which
      the output implies. "likelihood": the weight of the likelihood bound; not for
      velocity predictions.
    time_distribution: how training draws the time of the network. "uniform";
      "logit_normal": sigmoid(time_mean + time_std z) of a standard normal z; or "mode"
      (both arXiv 2403.03206, section 3.1).
    time_mean, time_std: of "logit_normal".
    time_shift: s >= 1 moves the drawn times towards noise, for high resolutions: t ->
      s t / (1 + (s - 1) t) (same paper, equation 23); 1 for no shift.
    sampling_shift: the same for the evenly spaced times of samplers; None for
      `time_shift`.
    data_time: time that the network receives for data: 1 (SiT; it receives 1 - t) or 0
      (SD3; it receives t).
    sigma_floor: smallest sigma that the velocity of an "x0" prediction is divided by;
      0.05 in JiT (arXiv 2511.13720).

  Raises:
    SettingError: a name is unknown, or a number is out of range.
  """

  path: str = "linear"
  prediction: str = "velocity"
  loss_weight: str = "none"
  time_distribution: str = "uniform"
  time_mean: float = 0.0
  time_std: float = 1.0
  time_shift: float = 1.0
  sampling_shift: float | None = None
  data_time: int = 1
  sigma_floor: float = 0.05

  def __post_init__(self):
    check_choice("path", self.path, PATHS)
    check_choice("prediction", self.prediction, PREDICTIONS)
    check_choice("loss_weight", self.loss_weight, LOSS_WEIGHTS)
    check_choice("time_distribution", self.time_distribution, DISTRIBUTIONS)
    check_choice("data_time", self.data_time, (0, 1))
    if self.prediction == "velocity" and self.loss_weight == "likelihood":
      raise SettingError(
        "loss_weight", self.loss_weight, "must be none or velocity: velocity prediction"
      )
    check_number("time_mean", self.time_mean)
    check_number("time_std", self.time_std, above=0)
    check_number("time_shift", self.time_shift, above=0)
    if self.sampling_shift is not None:
      check_number("sampling_shift", self.sampling_shift, above=0)
    check_number("sigma_floor", self.sigma_floor)
    if not 0 < self.sigma_floor < 1:
      raise SettingError("sigma_floor", self.sigma_floor, "must lie in (0, 1)")

  @property
  def start_time(self) -> float:
    """0: data."""
    return 0.0

  @property
  def end_time(self) -> float:
    """1: noise."""
    return 1.0

  @property
  def training_interval(self) -> tuple[float, float]:
    """(low, high) times that training draws, as released."""
    if self.path == "vp":
      return 1e-5, 1.0
    # The weight "likelihood" of "x0", which the released code lacks, is singular too.
    is_singular = self._is_singular or self.loss_weight == "likelihood"
    return (1e-3, 1 - 1e-3) if is_singular else (0.0, 1.0)

  @property
  def sampling_interval(self) -> tuple[float, float]:
    """(low, high) times of samplers, as released."""
    if self.path == "vp":
      return 1e-3, 1.0
    return (1e-3, 1 - 1e-3) if self._is_singular else (0.0, 1.0)

  @property
  def _is_singular(self) -> bool:
    """Whether the velocity of the output divides by alpha or sigma."""
    return self.prediction in ("epsilon", "score")

  @property
  def _direction(self) -> int:
    """Derivative of the network's time with respect to t."""
    return -1 if self.data_time == 1 else 1

  def alpha(self, t: Any) -> Any:
    """Returns the factor of the data at times t."""
    return PATHS[self.path].alpha(t)

  def sigma(self, t: Any) -> Any:
    """Returns the factor of the noise at times t."""
    return PATHS[self.path].sigma(t)

  def alpha_rate(self, t: Any) -> Any:
    """Returns d alpha / dt at times t."""
    return PATHS[self.path].alpha_rate(t)

  def sigma_rate(self, t: Any) -> Any:
    """Returns d sigma / dt at times t."""
    return PATHS[self.path].sigma_rate(t)

  def time_at(self, log_snr: np.ndarray) -> np.ndarray:
    """Returns the times at which log(alpha / sigma) has given values."""
    return PATHS[self.path].time_at(log_snr)

  def network_time(self, t: Array) -> Array:
    """Returns t or 1 - t, see `data_time`."""
    return 1 - t if self.data_time == 1 else t

  def shifted(self, t: np.ndarray) -> np.ndarray:
    """Returns the times of samplers for evenly spaced times, see `sampling_shift`."""
    shift = self.time_shift if self.sampling_shift is None else self.sampling_shift
    return _shifted(t, shift)

  def sample_t(self, key: Array, batch: int) -> Array:
    """Draws times (batch,) float32 for a training step."""
    if self.time_distribution == "logit_normal":
      normal = jax.random.normal(key, (batch,))
      network_time = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
    else:
      network_time = jax.random.uniform(key, (batch,))
    if self.time_distribution == "mode":
      network_time = mode_times(network_time)
    low, high = self.training_interval
    share = 1 - network_time if self.data_time == 1 else network_time
    return low + (high - low) * _shifted(share, self.time_shift)

  def weight(self, t: Array) -> Array:
    """Returns the weight of the squared error at times t: (B,) float32."""
    one, sigma = jnp.ones_like(t), self.sigma(t)
    if self.prediction == "velocity":
      return one
    if self.prediction == "x0" and self.loss_weight != "likelihood":
      return self._x0_rate(t) ** 2 if self.loss_weight == "velocity" else one
    # The error of the noise that an output implies, as a factor of the output's error.
    factor = {"epsilon": one, "score": sigma, "x0": self.alpha(t) / sigma}
    rate = {
      "none": one,
      "velocity": (self.diffusion_rate(t) / sigma) ** 2,
      "likelihood": self.diffusion_rate(t) / sigma**2,
    }
    return factor[self.prediction] ** 2 * rate[self.loss_weight]

  def target(self, x0: Array, noise: Array, t: Array) -> Array:
    """Returns the training target (B, H, W, C) of `prediction`."""
    if self.prediction == "x0":
      return x0
    if self.prediction == "epsilon":
      return noise
    if self.prediction == "score":
      return -noise / like(self.sigma(t), noise)
    rates = like(self.alpha_rate(t), x0), like(self.sigma_rate(t), x0)
    return self._direction * (rates[0] * x0 + rates[1] * noise)

  def to_x0(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the x0 that an output predicts: (B, H, W, C)."""
    if self.prediction == "x0":
      return output
    alpha, sigma = like(self.alpha(t), x_t), like(self.sigma(t), x_t)
    if self.prediction != "velocity":
      return (x_t - sigma * self.to_noise(output, x_t, t)) / alpha
    rate = like(self.sigma_rate(t), x_t)
    velocity = self._direction * output
    return (rate * x_t - sigma * velocity) / like(self._wronskian(t), x_t)

  def to_noise(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes the noise that an output predicts: (B, H, W, C)."""
    if self.prediction == "epsilon":
      return output
    alpha, sigma = like(self.alpha(t), x_t), like(self.sigma(t), x_t)
    if self.prediction == "score":
      return -sigma * output
    if self.prediction == "x0":
      return (x_t - alpha * output) / sigma
    rate = like(self.alpha_rate(t), x_t)
    velocity = self._direction * output
    return (alpha * velocity - rate * x_t) / like(self._wronskian(t), x_t)

  def to_velocity(self, output: Array, x_t: Array, t: Array) -> Array:
    """Computes dx_t/dt of the probability flow: (B, H, W, C)."""
    if self.prediction == "velocity":
      return self._direction * output
    if self.prediction == "x0":  # (sigma' / sigma) (x_t - alpha x0) + alpha' x0
      ratio = like(self.sigma_rate(t) / self._floored_sigma(t), x_t)
      return ratio * x_t - like(self._x0_rate(t), x_t) * output
    noise = self.to_noise(output, x_t, t)
    ratio = self.alpha_rate(t) / self.alpha(t)
    rest = self.sigma_rate(t) - ratio * self.sigma(t)
    return like(ratio, x_t) * x_t + like(rest, x_t) * noise

  def _wronskian(self, t: Any) -> Any:
    """sigma' alpha - sigma alpha', the determinant of (x_t, dx_t/dt)."""
    return self.sigma_rate(t) * self.alpha(t) - self.sigma(t) * self.alpha_rate(t)

  def _floored_sigma(self, t: Array) -> Array:
    return jnp.maximum(self.sigma(t), self.sigma_floor)

  def _x0_rate(self, t: Array) -> Array:
    """The factor of -x0 in the velocity: (sigma' alpha - sigma alpha') / sigma."""
    return self._wronskian(t) / self._floored_sigma(t)


def mode_times(u: Array) -> Array:
  """Turns uniform draws in [0, 1] into times of "mode" (arXiv 2403.03206, eq. 20)."""
  return 1 - u - MODE_SCALE * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def _shifted(t: Any, shift: float) -> Any:
  """Moves times towards noise (arXiv 2403.03206, equation 23)."""
  return shift * t / (1 + (shift - 1) * t)


PROCESSES["flow"] = Flow
