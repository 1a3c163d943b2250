"""Runs one step on all devices: python -m tests.training.replay FILE.npz."""

from __future__ import annotations

import sys

import jax
import numpy as np

from mdt_jax import sharding
from mdt_jax.experiment import build
from mdt_jax.training.program import make_program
from mdt_jax.training.step import step_key
from tests.training.tiny import tiny_config

NUM_KEEP = 10


def replay() -> dict[str, np.ndarray]:
  """Returns the draws, losses and parameters of a step, by name."""
  # MDT compiles faster than MDTv2, and AdamW faster than Adan.
  changes = {"model.name": "MDT-S/2", "optimizer.name": "adamw"}
  experiment = build(tiny_config(batch_size=16, seed=5, **changes))
  settings, objective = experiment.settings, experiment.objective

  rng = np.random.default_rng(0)
  batch = {
    "image": rng.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(0, 10, 16).astype(np.int32),
  }
  batch = sharding.put_batch(batch, experiment.mesh, settings.batch_size)
  program = make_program(experiment)
  state = program.init(jax.random.key(settings.seed))

  def losses(state, batch):
    draws = objective.draw(step_key(settings.seed, state.step), batch)
    _, found = objective.loss(experiment.model.apply, state.params, draws, NUM_KEEP)
    return draws, {name: found[name] for name in ("loss", "masked_loss")}

  # With initial parameters, the output is zero. Train for a few steps first.
  for _ in range(3):
    state, metrics = program.step(state, batch, NUM_KEEP)
  draws, found = jax.jit(losses)(state, batch)
  drawn = {name: value for name, value in vars(draws).items() if value is not None}
  arrays = {f"draws/{name}": value for name, value in drawn.items()}
  arrays |= {f"losses/{name}": value for name, value in found.items()}
  arrays |= {f"metrics/{name}": value for name, value in metrics.items()}
  arrays |= {
    f"params/{jax.tree_util.keystr(path)}": value
    for path, value in jax.tree_util.tree_leaves_with_path(state.params)
  }
  assert len(draws.noise.sharding.device_set) == jax.device_count()
  return {name: np.asarray(value) for name, value in arrays.items()}


if __name__ == "__main__":
  np.savez(sys.argv[1], **replay())
