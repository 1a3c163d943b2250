"""The samplers in time that add noise: SiT's SDE and EDM's stochastic Heun."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.runge_kutta import numbered
from mdt_jax.errors import SettingError, check_choice, check_number
from mdt_jax.types import Array

DIFFUSIONS = (
  "constant",
  "sbdm",
  "sigma",
  "linear",
  "decreasing",
  "increasing_decreasing",
)
LAST_STEPS = ("mean", "euler", "tweedie", "none")
EDGE = 1e-3  # of SiT, whose score and D are singular at the ends of some paths


@dataclasses.dataclass(frozen=True)
class SDE:
  """Arguments of "sde" and "sde_heun".

  The SDE is dx = (dx/dt - D score) dt + sqrt(2 D) dw, backwards in time.

  Attributes:
    diffusion: D(t), times `norm`: "constant": 1; "sbdm": g(t), see
      `ContinuousProcess.diffusion_rate`; "sigma": sigma(t); "linear": the share t of
      the process; "increasing_decreasing": sin(pi t)^2. "decreasing": ((1 - norm cos(pi
      t)) / 2)^2.
    norm: factor, see `diffusion`.
    last_step: step without noise at the end: "mean" (an Euler step of the drift),
      "euler" (of the probability flow), "tweedie" (the expectation of x0) or "none".
      None: "mean", or "tweedie" for a process that does not end at t = 0.
    last_step_size: length of this step.
  """

  diffusion: str = "sigma"
  norm: float = 1.0
  last_step: str | None = None
  last_step_size: float = 0.04

  def __post_init__(self):
    check_choice("diffusion", self.diffusion, DIFFUSIONS)
    if self.last_step is not None:
      check_choice("last_step", self.last_step, LAST_STEPS)
    check_number("norm", self.norm, above=0)
    check_number("last_step_size", self.last_step_size, above=0)
    if self.last_step_size >= 1:
      raise SettingError("last_step_size", self.last_step_size, "must be below 1")

  def end_of(self, process: ContinuousProcess) -> str:
    """Returns the last step for a process."""
    if self.last_step is None:
      return "mean" if process.start_time == 0 else "tweedie"
    return self.last_step

  def rate(self, process: ContinuousProcess, t: Array) -> Array:
    """Returns D at times t."""
    share = process.noise_share(t)
    if self.diffusion == "decreasing":
      return ((1 - self.norm * jnp.cos(jnp.pi * share)) / 2) ** 2
    forms: dict[str, Callable[[], Array]] = {
      "constant": lambda: jnp.ones_like(t),
      "sbdm": lambda: process.diffusion_rate(t),
      "sigma": lambda: process.sigma(t),
      "linear": lambda: share,
      "increasing_decreasing": lambda: jnp.sin(jnp.pi * share) ** 2,
    }
    return self.norm * forms[self.diffusion]()


@dataclasses.dataclass(frozen=True)
class Churn:
  """Arguments of "edm": the noise that is added before each step.

  Attributes:
    churn: S_churn; 0 for none. The noise level s = sigma / alpha is raised by the
      factor 1 + min(churn / steps, sqrt(2) - 1).
    churn_min, churn_max: S_min and S_max: levels s at which noise is added.
    churn_noise: S_noise: standard deviation of the noise.
  """

  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = 1e9
  churn_noise: float = 1.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      check_number(name, value)
      if value < 0:
        raise SettingError(name, value, "must be 0 or more")

  def factors(self, levels: np.ndarray) -> np.ndarray:
    """Returns the factor 1 + gamma of each level (S,)."""
    gamma = min(self.churn / len(levels), np.sqrt(2) - 1)
    inside = (levels >= self.churn_min) & (levels <= self.churn_max)
    return np.where(inside, 1 + gamma, 1.0)


class Prediction(NamedTuple):
  """An output of the network at latents x_t and times t."""

  process: ContinuousProcess
  output: Array
  x: Array
  t: Array

  @property
  def velocity(self) -> Array:
    """dx_t/dt of the probability flow."""
    return self.process.to_velocity(self.output, self.x, self.t)

  @property
  def score(self) -> Array:
    """Gradient of log p(x_t)."""
    return self.process.to_score(self.output, self.x, self.t)

  @property
  def x0(self) -> Array:
    """Expectation of x0."""
    return self.process.to_x0(self.output, self.x, self.t)


Predict = Callable[[Array, Array, Array], Prediction]


def sde_interval(
  process: ContinuousProcess, method: str, arguments: SDE, end: str
) -> tuple[float, float]:
  """Returns the (low, high) times of an SDE, where D and the score are finite."""
  low, high = process.sampling_interval
  if process.start_time != 0:
    if end in ("mean", "euler"):
      raise SettingError(
        "last_step", end, "must be tweedie or none: the process does not end at t = 0"
      )
    return low, high
  if arguments.diffusion == "sbdm" and not np.isfinite(process.log_snr(np.array(high))):
    high -= EDGE
  if end != "none":
    if not arguments.last_step_size < high:
      raise SettingError(
        "last_step_size", arguments.last_step_size, f"must be below {high:g}"
      )
    return arguments.last_step_size, high
  return (max(low, EDGE) if method == "sde_heun" else low), high  # it calls at the end


def solve_sde(
  process: ContinuousProcess,
  predict: Predict,
  times: np.ndarray,
  x: Array,
  draw: Callable[[Array], Array],
  method: str,
  arguments: SDE,
) -> Array:
  """Integrates the SDE from the first to the last time, then takes the last step."""
  end = arguments.end_of(process)

  per_step = 2 if method == "sde_heun" else 1

  def drift(x: Array, t: Array, call: Array) -> Array:
    at = predict(x, t, call)
    return at.velocity - arguments.rate(process, t) * at.score

  def step(x: Array, inputs: tuple[Array, dict[str, Array]]):
    number, row = inputs
    h, t, call = row["h"], row["t"], per_step * number
    noise = jnp.sqrt(2 * arguments.rate(process, t) * h) * draw(number)
    if method == "sde":
      return x - h * drift(x, t, call) + noise, None
    x += noise
    first = drift(x, t, call)
    second = drift(x - h * first, t - h, call + 1)
    return x - h / 2 * (first + second), None

  steps = len(times) - 1
  x, _ = jax.lax.scan(step, x, numbered({"t": times[:-1], "h": -np.diff(times)}))
  if end == "none":
    return x
  t, call = jnp.float32(times[-1]), jnp.int32(per_step * steps)
  if end == "mean":
    return x - arguments.last_step_size * drift(x, t, call)
  at = predict(x, t, call)
  if end == "euler":
    return x - arguments.last_step_size * at.velocity
  return at.x0 * process.alpha(np.array(process.start_time))


def solve_edm(
  process: ContinuousProcess,
  predict: Predict,
  times: np.ndarray,
  x: Array,
  draw: Callable[[Array], Array],
  arguments: Churn,
) -> Array:
  """EDM's algorithm 2, in y = x / alpha and s = sigma / alpha."""
  levels = np.exp(-process.log_snr(times))
  raised = levels * arguments.factors(levels)
  following = np.append(levels[1:], 0.0)
  churned = process.time_at(-np.log(raised))
  rows = {
    "s": raised,
    "t": churned,
    "alpha": process.alpha(churned),
    "noise": arguments.churn_noise * np.sqrt(raised**2 - levels**2),
    "next_s": following,
    "next_t": np.append(times[1:], times[-1]),
    "next_alpha": np.append(process.alpha(times[1:]), 1.0),
  }

  def step(y: Array, inputs: tuple[Array, dict[str, Array]]):
    number, row = inputs
    y += row["noise"] * draw(number)
    x0 = predict(row["alpha"] * y, row["t"], 2 * number).x0
    slope, h = (y - x0) / row["s"], row["next_s"] - row["s"]
    euler = y + h * slope

    def corrected() -> Array:
      x0 = predict(row["next_alpha"] * euler, row["next_t"], 2 * number + 1).x0
      return y + h / 2 * (slope + (euler - x0) / row["next_s"])

    # The last step, to no noise, has no corrector.
    return jax.lax.cond(row["next_s"] > 0, corrected, lambda: euler), None

  y, _ = jax.lax.scan(step, x / process.alpha(times[0]), numbered(rows))
  return y
