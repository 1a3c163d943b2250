"""Compares the gradients of an objective on one device and on a mesh of eight."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mdt_jax import sharding
from mdt_jax.experiment import build
from tests import forked, reference
from tests.training.test_step import make_batch

MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def assert_gradients_agree(folder: Path, config: ConfigDict, num_keep: int) -> None:
  """Asserts that losses and gradients do not depend on the number of devices.

  Args:
    folder: an empty folder for the results of both processes.
    config: of the run; both processes replace its mesh.
    num_keep: number of kept tokens.
  """
  results = []
  for count, mesh in ((1, {}), (8, MESH)):
    placed = config.copy_and_resolve_references()
    placed.update_from_flattened_dict(mesh)
    path = folder / f"{count}.npz"
    arguments = (path, placed, num_keep)
    process = forked.Forked(save_gradients, *arguments, num_devices=count)
    assert process.end() == 0, process.err
    results.append(dict(np.load(path)))
  one, eight = results
  for name, value in one.items():
    assert reference.relative_error(eight[name], value) < 1e-5, name


def save_gradients(path: Path, config: ConfigDict, num_keep: int) -> None:
  """Saves the losses and gradients of a batch, on all devices of the process."""
  experiment = build(config)
  objective, mesh = experiment.objective, experiment.mesh
  params = reference.random_params(experiment.model)

  def of_part(params, draws):
    loss = functools.partial(objective.loss, experiment.model.apply)
    return jax.grad(lambda p: loss(p, draws, num_keep), has_aux=True)(params)

  @jax.jit
  def gradients(params, batch):
    draws = objective.draw(jax.random.key(0), batch)
    return sharding.mean_over_data(of_part, mesh)(params, draws)

  with sharding.use_mesh(mesh):
    arrays = {
      name: np.random.default_rng(0).standard_normal((config.batch_size, *shape))
      for name, shape in experiment.model.conditioning.arrays().items()
    }
    batch = {**make_batch(config), **arrays}
    batch = sharding.put_batch(batch, mesh, config.batch_size)
    placed = jax.device_put(params, sharding.of_state(mesh, params))
    found, losses = jax.device_get(gradients(placed, batch))
  leaves = {"/".join(names): leaf for names, leaf in flatten_dict(found).items()}
  np.savez(path, **leaves, **losses)
