"""Samplers of continuous processes whose steps are steps in time.

They integrate the probability flow dx/dt, or an SDE with the same marginals, with the
velocity and the score that the network's output implies (SiT, arXiv 2401.08740). "edm"
is EDM's stochastic sampler (arXiv 2206.00364, algorithm 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion.continuous import ContinuousProcess, TimeGrid
from mdt_jax.diffusion.process import Process
from mdt_jax.errors import SettingError, check_arguments, check_choice, check_number
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


class Tableau(NamedTuple):
  """An explicit Runge-Kutta method of s stages.

  Attributes:
    nodes: (s,) times of the stages, as shares of the step.
    stages: (s, s) weights of the earlier slopes in the latent of each stage.
    ends: (s,) weights of the slopes in the result.
  """

  nodes: np.ndarray
  stages: np.ndarray
  ends: np.ndarray


def _tableau(stages: list[list[float]], ends: list[float]) -> Tableau:
  """Builds a tableau; each stage lists the weights of the stages before it."""
  count = len(ends)
  table = np.zeros((count, count))
  for i, row in enumerate(stages):
    table[i, : len(row)] = row
  return Tableau(table.sum(axis=1), table, np.array(ends))


# Method -> Runge-Kutta method, with the names of torchdiffeq but for "heun", which it
# calls heun2. "rk4" is the 3/8 rule.
RUNGE_KUTTA = {
  "ode_euler": _tableau([[]], [1]),
  "ode_midpoint": _tableau([[], [1 / 2]], [0, 1]),
  "ode_heun": _tableau([[], [1]], [1 / 2, 1 / 2]),
  "ode_heun3": _tableau([[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
  "ode_rk4": _tableau(
    [[], [1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8]
  ),
}


@dataclasses.dataclass(frozen=True)
class NoArguments:
  """The methods ode_* have no arguments."""


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


# Method -> class of its arguments.
ARGUMENTS: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(RUNGE_KUTTA, NoArguments),
  "sde": SDE,
  "sde_heun": SDE,
  "edm": Churn,
}
TIME_SOLVERS = tuple(ARGUMENTS)
RANDOM = ("sde", "sde_heun", "edm")


def make_arguments(method: str, given: Mapping[str, Any]) -> Any:
  """Returns the arguments of a method.

  Args:
    method: one of TIME_SOLVERS.
    given: name -> value; the others have their defaults.

  Raises:
    SettingError: an argument is unknown or out of range.
  """
  check_arguments(ARGUMENTS[method], given, f"the method {method!r}")
  return ARGUMENTS[method](**given)


def make_grid(
  process: Process, method: str, num_steps: int, spacing: str | None, arguments: Any
) -> TimeGrid:
  """Returns a process at the times of a sampler.

  Args:
    process: a continuous process.
    method: one of TIME_SOLVERS.
    num_steps: number of steps, of which the last step of an SDE is one. SiT's released
      code counts the times instead: 250 for an ODE are 249 steps, and 250 for an SDE
      with a last step are 250.
    spacing: see `ContinuousProcess.spaced_times`; None for
      `Process.default_spacing`, else "karras" for edm and "uniform" for the others.
    arguments: from `make_arguments`.

  Raises:
    SettingError: the process is not continuous, or a number is out of range.
  """
  if not isinstance(process, ContinuousProcess):
    raise _not_continuous(process, method)
  own = "karras" if method == "edm" else "uniform"
  spacing = spacing or process.default_spacing or own
  if method == "edm":
    grid = process.respaced(spacing, num_steps)
    if not np.isfinite(grid.levels().log_snr[-1]):
      raise SettingError("spacing", spacing, "must be log_snr or karras for edm")
    return grid
  low, high = process.sampling_interval
  steps = num_steps
  if isinstance(arguments, SDE):
    end = arguments.end_of(process)
    steps -= end != "none"
    low, high = _sde_interval(process, method, arguments, end)
  if steps < 1:
    raise SettingError(
      "num_steps", num_steps, f"must be at least {1 + num_steps - steps} for {method}"
    )
  times = process.spaced_times(spacing, np.linspace(0, 1, steps + 1))
  # The spacings of levels of noise stop before the ends.
  share = (times - times[0]) / (times[-1] - times[0])
  return TimeGrid(process, low + share * (high - low))


def as_grid(process: Process, method: str) -> TimeGrid:
  """Returns the process; raises SettingError if it is not one of `make_grid`."""
  if not isinstance(process, TimeGrid):
    raise _not_continuous(process, method)
  return process


def _not_continuous(process: Process, method: str) -> SettingError:
  name = type(process).__name__
  accepted = f"needs a process in continuous time, such as flow or edm, not {name}"
  return SettingError("method", method, accepted)


def _sde_interval(
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
  edge = 1e-3  # of SiT, whose paths are singular at both ends
  if arguments.diffusion == "sbdm" and not np.isfinite(process.log_snr(np.array(high))):
    high -= edge
  if end != "none":
    return arguments.last_step_size, high
  return (max(low, edge) if method == "sde_heun" else low), high  # it calls at the end


def integrate(
  network: Callable[[Array, Array], Array],
  grid: TimeGrid,
  x: Array,
  draw: Callable[[Array], Array],
  report: Callable[[Array], None],
  *,
  method: str,
  arguments: Any,
) -> Array:
  """Samples x_0 from the noisy latent at the last time of a grid.

  Args:
    network: (x_t (B, H, W, C), network's times (B,)) -> output, float32.
    grid: from `make_grid`, or its first times, for an edit.
    x: (B, H, W, C) latent at the last time of `grid`.
    draw: number () of a step -> standard normal noise (B, H, W, C).
    report: called with the number of each network call.
    method, arguments: see `make_grid`.

  Returns:
    (B, H, W, C) float32.
  """
  process, times = grid.process, grid.times[::-1]

  def predict(x: Array, t: Array, call: Array) -> Prediction:
    report(call)
    t = jnp.full((x.shape[0],), t)
    return Prediction(process, network(x, process.network_time(t)), x, t)

  if method == "edm":
    return _edm(process, predict, times, x, draw, arguments)
  if method in RUNGE_KUTTA:
    x = _runge_kutta(predict, times, x, RUNGE_KUTTA[method])
  else:
    x = _sde(process, predict, times, x, draw, method, arguments)
  # A process may end with data at another scale, as EDM's does.
  return x / process.alpha(np.array(process.start_time))


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


def _runge_kutta(predict: Predict, times: np.ndarray, x: Array, tableau: Tableau):
  """Integrates dx/dt over the times; one row for each network call."""
  count, steps = len(tableau.ends), len(times) - 1
  h = np.diff(times)[:, None]
  rows = {
    "t": (times[:-1, None] + h * tableau.nodes).ravel(),
    "weights": (h[..., None] * tableau.stages).reshape(-1, count),
    "stage": np.tile(np.arange(count), steps),
    "ends": np.repeat(h * tableau.ends, count, axis=0),
    "is_last": np.tile(np.arange(count) == count - 1, steps),
  }

  def call(state: tuple[Array, Array], inputs: tuple[Array, dict[str, Array]]):
    (start, slopes), (number, row) = state, inputs
    latent = start + jnp.tensordot(row["weights"], slopes, 1)
    slope = predict(latent, row["t"], number).velocity
    slopes = slopes.at[row["stage"]].set(slope)
    end = start + jnp.tensordot(row["ends"], slopes, 1)
    return (jnp.where(row["is_last"], end, start), slopes), None

  slopes = jnp.zeros((count, *x.shape))
  (x, _), _ = jax.lax.scan(call, (x, slopes), _numbered(rows))
  return x


def _sde(
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
  x, _ = jax.lax.scan(step, x, _numbered({"t": times[:-1], "h": -np.diff(times)}))
  if end == "none":
    return x
  t, call = jnp.float32(times[-1]), jnp.int32(per_step * steps)
  if end == "mean":
    return x - arguments.last_step_size * drift(x, t, call)
  at = predict(x, t, call)
  if end == "euler":
    return x - arguments.last_step_size * at.velocity
  return at.x0 * process.alpha(np.array(process.start_time))


def _edm(
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

  y, _ = jax.lax.scan(step, x / process.alpha(times[0]), _numbered(rows))
  return y


def _numbered(rows: Mapping[str, np.ndarray]) -> tuple[Array, dict[str, Array]]:
  """Returns (numbers, rows) for lax.scan, in int32 and float32."""
  count = len(next(iter(rows.values())))
  cast = {
    name: jnp.asarray(row, jnp.float32 if row.dtype == np.float64 else None)
    for name, row in rows.items()
  }
  return jnp.arange(count, dtype=jnp.int32), cast


def num_calls(method: str, num_steps: int, arguments: Any) -> int:
  """Number of network calls of a sampler with so many times; see `make_grid`."""
  if method == "edm":
    return 2 * num_steps - 1
  if method in RUNGE_KUTTA:
    return (num_steps - 1) * len(RUNGE_KUTTA[method].ends)
  per_step = 2 if method == "sde_heun" else 1
  return (num_steps - 1) * per_step + (arguments.last_step != "none")
