"""Explicit Runge-Kutta methods over a fixed grid of times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.types import Array


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


# Sampler -> Runge-Kutta method, with the names of torchdiffeq but for "heun", which it
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


def integrate(
  slope: Callable[[Any, Array, Array], Any],
  times: np.ndarray,
  state: Any,
  tableau: Tableau,
) -> Any:
  """Integrates d state / dt = slope(state, t) over a grid of times.

  Args:
    slope: (state, time (), number of the call ()) -> derivative of the state.
    times: (N,) float64, in the order of the integration.
    state: a tree of arrays at the first time.
    tableau: the method.

  Returns:
    The state at the last time.
  """
  count, steps = len(tableau.ends), len(times) - 1
  h = np.diff(times)[:, None]
  rows = {
    "t": (times[:-1, None] + h * tableau.nodes).ravel(),
    "weights": (h[..., None] * tableau.stages).reshape(-1, count),
    "stage": np.tile(np.arange(count), steps),
    "ends": np.repeat(h * tableau.ends, count, axis=0),
    "is_last": np.tile(np.arange(count) == count - 1, steps),
  }

  def moved(start: Any, weights: Array, slopes: Any) -> Any:
    return jax.tree.map(lambda x, k: x + jnp.tensordot(weights, k, 1), start, slopes)

  def call(
    carry: tuple[Any, Any], inputs: tuple[Array, dict[str, Array]]
  ) -> tuple[tuple[Any, Any], None]:
    (start, slopes), (number, row) = carry, inputs
    found = slope(moved(start, row["weights"], slopes), row["t"], number)
    slopes = jax.tree.map(lambda k, new: k.at[row["stage"]].set(new), slopes, found)
    end = moved(start, row["ends"], slopes)
    start = jax.tree.map(lambda a, b: jnp.where(row["is_last"], a, b), end, start)
    return (start, slopes), None

  slopes = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), state)
  (state, _), _ = jax.lax.scan(call, (state, slopes), numbered(rows))
  return state


def numbered(rows: Mapping[str, np.ndarray]) -> tuple[Array, dict[str, Array]]:
  """Returns (numbers, rows) for lax.scan, in int32 and float32."""
  count = len(next(iter(rows.values())))
  cast = {
    name: jnp.asarray(row, jnp.float32 if row.dtype == np.float64 else None)
    for name, row in rows.items()
  }
  return jnp.arange(count, dtype=jnp.int32), cast
