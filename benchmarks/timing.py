"""Timings of things that take turns, so that a noisy machine is unjust to none."""

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
  """Seconds of each turn."""

  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  @property
  def spread(self) -> float:
    """Half of what lies between the quartiles, as a share of the median."""
    if len(self.seconds) < 2:
      return 0.0
    low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
    return (high - low) / 2 / self.median


def take_turns(
  functions: dict[str, Callable[[], None]], repeats: int
) -> dict[str, Times]:
  """Times functions, which return once they are done, one after another, repeatedly.

  In each turn a function runs twice and the second run counts: the first one fetches
  the memory that the system took back, or that another function pushed out of caches,
  which no run of that function alone would have to do.
  """
  seconds = {name: [] for name in functions}
  for turn in range(1 + repeats):  # the first turn warms up
    for name, function in functions.items():
      function()
      start = time.perf_counter()
      function()
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: Times(tuple(values)) for name, values in seconds.items()}


def matmul_rate(dtype: str, size: int | None = None, repeats: int = 10) -> float:
  """Operations a second of square matrix products on one device, the best of them.

  Args:
    dtype: of the factors.
    size: of a side; None for one that keeps the device busy.
    repeats: products that are timed.
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
  """What the figures were measured on."""
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
