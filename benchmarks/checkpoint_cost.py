"""Measures the cost of checkpoints: python -m benchmarks.checkpoint_cost

Trains a wide network on digits, whose state takes more than a gigabyte. Time windows
with and without a save alternate. The cost of a save is the relative reduction of
training steps per second in a window of --seconds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging

from benchmarks import tables
from mdt_jax import sharding
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.configs import digits
from mdt_jax.data.loader import create_loader
from mdt_jax.experiment import build
from mdt_jax.training.program import make_program

SECONDS = flags.DEFINE_float("seconds", 60.0, "Length of a window.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Number of windows of each kind.")
WIDTH = flags.DEFINE_integer("width", 640, "Width of the network.")
DEPTH = flags.DEFINE_integer("depth", 12, "Depth of the network.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images per step.")
FOLDER = flags.DEFINE_string(
  "folder", None, "Folder on the disk to save to; default: a temporary folder."
)
JSON = flags.DEFINE_string("json", None, "File for all measurements.")


def main(argv: list[str]) -> None:
  del argv
  absl_logging.set_verbosity(absl_logging.WARNING)  # hides Orbax's many info lines
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      "batch_size": BATCH_SIZE.value,
      "num_steps": 10**9,
      "model.hidden_size": WIDTH.value,
      "model.depth": DEPTH.value,
      "model.num_heads": 8,
      "model.unroll": 1,
      "optimizer.schedule": "constant",
      "masking.num_lengths": 1,
    }
  )
  experiment = build(config)
  settings, mesh = experiment.settings, experiment.mesh
  batches = create_loader(
    experiment.source,
    seed=settings.seed,
    batch_size=settings.batch_size,
    flip=settings.data.flip,
    num_threads=0,
  )
  static = experiment.objective.static_choices[0]
  with (
    tempfile.TemporaryDirectory(dir=FOLDER.value) as folder,
    sharding.use_mesh(mesh),
  ):
    program = make_program(experiment)
    state = program.init(jax.random.key(settings.seed))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    saved = Checkpoints(Path(folder), settings.checkpoints_to_keep)
    numbers = itertools.count(1)

    def train(seconds: float, saves: bool) -> tuple[float, float]:
      """Returns (steps per second, seconds that the save blocked the loop)."""
      nonlocal state
      start, steps, held = time.monotonic(), 0, 0.0
      while (passed := time.monotonic() - start) < seconds:
        if saves and not steps:
          saved.save(next(numbers), state, settings.to_dict())
          held = time.monotonic() - start
        batch = sharding.put_batch(next(batches), mesh, settings.batch_size)
        state, metrics = program.step(state, batch, static)
        jax.block_until_ready(metrics)
        steps += 1
      return steps / passed, held

    train(SECONDS.value / 4, saves=True)  # warm-up: compiles and opens files
    windows = [
      (train(SECONDS.value, saves=False), train(SECONDS.value, saves=True))
      for _ in range(REPEATS.value)
    ]
    saved.close()
  costs = [1 - with_save[0] / without[0] for without, with_save in windows]
  held = [with_save[1] for _, with_save in windows]
  report = {
    "machine": tables.machine(),
    "state_bytes": size,
    "seconds_between_saves": SECONDS.value,
    "steps_per_second": statistics.median(without[0] for without, _ in windows),
    "cost": costs,
    "seconds_held_up": held,
  }
  print(report["machine"])
  print(
    f"state of {size / 1e9:.2f} GB, {report['steps_per_second']:.2f} steps/s; a save "
    f"every {SECONDS.value:g} s costs {statistics.median(costs):.1%} of the steps "
    f"(from {min(costs):.1%} to {max(costs):.1%}) and blocks the loop for "
    f"{statistics.median(held):.2f} s"
  )
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
