"""Samplers of continuous processes whose steps are steps in time.

They integrate the probability flow dx/dt, or an SDE with the same marginals, with the
velocity and the score that the network's output implies (SiT, arXiv 2401.08740). "edm"
is EDM's stochastic sampler (arXiv 2206.00364, algorithm 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdt_jax.diffusion import runge_kutta
from mdt_jax.diffusion.continuous import ContinuousProcess, TimeGrid
from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.runge_kutta import RUNGE_KUTTA
from mdt_jax.diffusion.stochastic import (
  SDE,
  Churn,
  Prediction,
  sde_interval,
  solve_edm,
  solve_sde,
)
from mdt_jax.errors import SettingError, check_arguments, named_in_errors
from mdt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class NoArguments:
  """The methods ode_* have no arguments."""


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
  with named_in_errors("arguments"):
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
    with named_in_errors("arguments"):
      low, high = sde_interval(process, method, arguments, end)
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
    return solve_edm(process, predict, times, x, draw, arguments)
  if method in RUNGE_KUTTA:

    def velocity(x: Array, t: Array, call: Array) -> Array:
      return predict(x, t, call).velocity

    x = runge_kutta.integrate(velocity, times, x, RUNGE_KUTTA[method])
  else:
    x = solve_sde(process, predict, times, x, draw, method, arguments)
  # A process may end with data at another scale, as EDM's does.
  return x / process.alpha(np.array(process.start_time))


def num_calls(method: str, num_steps: int, arguments: Any) -> int:
  """Number of network calls of a sampler with so many times; see `make_grid`."""
  if method == "edm":
    return 2 * num_steps - 1
  if method in RUNGE_KUTTA:
    return (num_steps - 1) * len(RUNGE_KUTTA[method].ends)
  per_step = 2 if method == "sde_heun" else 1
  return (num_steps - 1) * per_step + (arguments.last_step != "none")
