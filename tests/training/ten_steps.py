"""Runs ten steps: python -m tests.training.ten_steps FOLDER VARIANT:SIZES …

Each run has its own network and mesh, and uses all devices of all processes. SIZES are
config.mesh.data, fsdp, tensor and slices, with commas. The losses and parameters of a
run are written to FOLDER/VARIANT:SIZES.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from mdt_jax import sharding
from mdt_jax.training import distributed, loop, trainer
from tests.faults import runs
from tests.training.tiny import tiny_config

NUM_STEPS = 10


def run(variant: str, sizes: str, workdir: Path) -> dict[str, np.ndarray]:
  """Returns the losses of each step and the last parameters, by name."""
  data, fsdp, tensor, slices = map(int, sizes.split(","))
  config = tiny_config(
    **{
      "num_steps": NUM_STEPS,
      "batch_size": 16,
      "model.name": f"{variant}-S/2",
      "seed": 5,
      "checkpoint_every": 5,
      "optimizer.name": "adamw",  # Compiles faster than Adan.
      "sample_every": NUM_STEPS if jax.process_count() == 2 else 0,
      "num_samples": 3,
      "mesh.data": data,
      "mesh.fsdp": fsdp,
      "mesh.tensor": tensor,
      "mesh.slices": slices,
    }
  )
  metrics = []
  add = trainer.Progress.add

  def recording(self, done, found):
    metrics.append(jax.device_get(found))
    add(self, done, found)

  trainer.Progress.add = recording
  try:
    state = loop.train(config, workdir)
  finally:
    trainer.Progress.add = add
  arrays = {
    f"losses/{name}": np.stack([found[name] for found in metrics])
    for name in ("loss", "masked_loss", "gradient_norm")
    if name in metrics[0]
  }
  for path, array in jax.tree_util.tree_leaves_with_path(state.params):
    arrays[f"params/{jax.tree_util.keystr(path)}"] = sharding.fetch(array)
  return arrays


if __name__ == "__main__":
  distributed.start()
  runs.save_whole_arrays()
  folder = Path(sys.argv[1])
  for name in sys.argv[2:]:
    found = run(*name.split(":"), folder / name)
    if jax.process_index() == 0:
      np.savez(folder / f"{name}.npz", **found)
