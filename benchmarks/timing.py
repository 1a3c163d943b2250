"""Times functions in alternation, so that noise of the machine affects all equally."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of each timed turn."""

  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    """Median of the seconds."""
    return statistics.median(self.seconds)

  @property
  def spread(self) -> float:
    """Half of the interquartile range, as a share of the median."""
    if len(self.seconds) < 2:
      return 0.0
    low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
    return (high - low) / 2 / self.median


def take_turns(
  functions: dict[str, Callable[[], None]], repeats: int
) -> dict[str, Times]:
  """Times functions in alternation.

  In each turn, each function runs twice and the second run is timed. The first run
  brings memory and caches into the state that the function would have if it ran alone.

  Args:
    functions: functions by name; a function must return only after its work is done.
    repeats: number of timed turns.

  Returns:
    Times by name.
  """
  seconds = {name: [] for name in functions}
  for turn in range(1 + repeats):  # the first turn is a warm-up
    for name, function in functions.items():
      function()
      start = time.perf_counter()
      function()
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: Times(tuple(values)) for name, values in seconds.items()}


def matmul_rate(dtype: str, size: int | None = None, repeats: int = 10) -> float:
  """The best measured FLOPs per second of square matrix products on one device.

  Args:
    dtype: dtype of the matrices.
    size: rows and columns of the matrices; None for a size that saturates the device.
    repeats: number of timed turns.
  """
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  a = jnp.ones((size, size), dtype)
  count = 1 if jax.default_backend() == "cpu" else 16

  @functools.partial(jax.jit, static_argnames="count")
  def products(a: jax.Array, count: int) -> jax.Array:
    return jax.lax.fori_loop(0, count, lambda _, b: (a @ b) / size, a)

  times = take_turns({"": lambda: jax.block_until_ready(products(a, count))}, repeats)
  return count * 2 * size**3 / min(times[""].seconds)


def device() -> str:
  """Number and kind of the devices, and the JAX version."""
  kind = jax.devices()[0].device_kind
  return f"{jax.device_count()} x {kind}, jax {jax.__version__}"


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """Memory of a compiled function on one device: arguments and temporaries."""
  memory = compiled.memory_analysis()
  aliased = memory.alias_size_in_bytes
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - aliased
  )
