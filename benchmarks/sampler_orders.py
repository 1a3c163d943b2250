"""Errors of samplers by number of steps: python -m benchmarks.sampler_orders

Writes a table to docs/processes.md: the largest distance of samples from the exact end
of the probability flow, for normal data with its exact score.
"""

from __future__ import annotations

import math

from benchmarks.tables import machine, write_table
from mdt_jax.diffusion.solvers import SOLVERS
from tests.diffusion.test_continuous import ORDERS, PROCESSES, error

STEPS = (8, 16, 32, 64)


def main() -> None:
  lines = [
    f"{machine()} (`python -m benchmarks.sampler_orders`), float32.",
    "",
    f"| process | sampler | {' | '.join(f'{n} steps' for n in STEPS)} | order |",
    f"| --- | --- |{' --- |' * (len(STEPS) + 1)}",
  ]
  for process in PROCESSES:
    for method in ORDERS:
      if process == "gaussian" and method not in SOLVERS:
        continue
      errors = [error(process, method, steps) for steps in STEPS]
      order = math.log2(errors[1] / errors[2])
      shown = " | ".join(f"{e:.1e}" for e in errors)
      lines.append(f"| {process} | {method} | {shown} | {order:.1f} |")
      print(lines[-1], flush=True)
  write_table("processes.md", "orders", lines)


if __name__ == "__main__":
  main()
