"""Replays one training step, to find out why its loss or gradient was not finite."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import sharding
from mdt_jax.atomic import write_json
from mdt_jax.checkpoints.lock import locked
from mdt_jax.checkpoints.manager import FOLDER, Checkpoints
from mdt_jax.data.loader import batch_indices, create_loader
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import check_eval
from mdt_jax.experiment import Experiment, build
from mdt_jax.logs import logger
from mdt_jax.objectives import Draws
from mdt_jax.objectives.objective import Losses
from mdt_jax.paths import absolute, output_folder
from mdt_jax.train_state import TrainState
from mdt_jax.training.initialization import Initialization
from mdt_jax.training.program import make_program
from mdt_jax.training.step import step_key
from mdt_jax.types import Array, Batch, Params

# (state, batch, static) -> loss (), losses (B,) by name, gradients, draws
Look = Callable[[TrainState, Batch, Hashable], tuple[Array, Losses, Params, Draws]]


def replay(
  config: ConfigDict, workdir: str | os.PathLike[str], step: int
) -> dict[str, Any]:
  """Trains again from a checkpoint up to one step, and reports what is not finite.

  The replay starts at the last checkpoint at or before `step`, or at step 0 if there is
  none. All steps have the same bits as in the original run.

  Args:
    config: config of the run.
    workdir: folder of the run. `replay` writes replay_STEP.json there, and sets damaged
      checkpoints aside, as training does; nothing else changes.
    step: number of the step, from 0.

  Returns:
    The content of replay_STEP.json; numbers that are not finite are None (null in
    JSON):
      "step", "batch": numbers of the step and of its batch, from 0.
      "kept_tokens": number of tokens in the masked pass.
      "loss": the loss of the batch.
      "parameters", "gradients": names of the arrays that are not finite.
      "examples": for each example of the batch: "index" in the training data, "label",
        time "t", "largest" absolute value of x0, and the losses of the example times
        the weight of the timestep sampler.

  Raises:
    SettingError: `step` is outside of the run, `workdir` holds no checkpoints of this
      run, or there are several processes.
  """
  experiment = build(config)
  settings = experiment.settings
  check_eval(settings)
  if jax.process_count() > 1:
    raise SettingError("--replay_step", step, "must be run by one process only")
  if not 0 <= step < settings.num_steps:
    raise SettingError(
      "--replay_step", step, f"must lie in [0, config.num_steps = {settings.num_steps})"
    )
  workdir = absolute(output_folder("--workdir", workdir))
  if not (workdir / FOLDER).is_dir():
    raise SettingError(
      "--workdir", str(workdir), f"must be the folder of a run: no {FOLDER!r} in it"
    )
  experiment.open()
  mesh, source, objective = experiment.mesh, experiment.source, experiment.objective
  program = make_program(experiment)
  with locked(workdir), sharding.use_mesh(mesh):
    saved = Checkpoints(workdir, settings.checkpoints_to_keep)
    if saved.latest_step(step) is None:
      start = Initialization(experiment, workdir)
      if (later := saved.latest_step()) is not None:
        start.recall(saved.settings(later))
      state = start.first_state(program)
    else:
      state = saved.restore(program.state, experiment, until=step)
    saved.close()
    offset = int(state.batch_offset)
    logger.info("replaying steps %d to %d", int(state.step), step)
    batches = create_loader(
      source,
      seed=settings.seed,
      batch_size=settings.batch_size,
      flip=settings.data.flip,
      start_step=int(state.step) + offset,
      rows=sharding.local_rows(mesh, settings.batch_size),
    )
    while True:
      n = int(state.step)
      batch = sharding.put_batch(next(batches), mesh, settings.batch_size)
      batch = experiment.encode(batch)
      static = objective.choose_static(settings.seed, n)
      if n == step:
        break
      state, _ = program.step(state, batch, static)
    loss, losses, gradients, draws = _make_look(experiment)(state, batch, static)
    examples = batch_indices(
      len(source), settings.seed, settings.batch_size, n + offset
    )
    found = {
      "step": step,
      "batch": step + offset,
      "kept_tokens": static,
      "loss": _number(loss),
      "parameters": _not_finite(state.params),
      "gradients": _not_finite(gradients),
      "examples": _rows(examples, batch["label"], draws, losses),
    }
  path = workdir / f"replay_{step}.json"
  write_json(path, found)
  logger.info(
    "step %d, batch %d: loss %s; not finite: %d parameters, %d gradients, and the "
    "losses of %d of %d examples; details in %s",
    step,
    found["batch"],
    found["loss"],
    len(found["parameters"]),
    len(found["gradients"]),
    sum(None in row.values() for row in found["examples"]),
    len(examples),
    path,
  )
  return found


def _make_look(experiment: Experiment) -> Look:
  """Builds the jitted function that computes a step's gradients without the update."""
  objective, seed = experiment.objective, experiment.settings.seed

  def look(
    state: TrainState, batch: Batch, static: Hashable
  ) -> tuple[Array, Losses, Params, Draws]:
    draws = objective.draw(step_key(seed, state.step), batch, state.loss_history)

    def loss(params: Params) -> tuple[Array, Losses]:
      return objective.loss(experiment.model.apply, params, draws, static)

    (value, losses), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    weighted = {name: loss * draws.weights for name, loss in losses.items()}
    return value, weighted, gradients, draws

  return jax.jit(look, static_argnums=2)


def _rows(
  examples: list[int], labels: jax.Array, draws: Draws, losses: dict[str, jax.Array]
) -> list[dict[str, Any]]:
  """The entries of "examples" in replay_STEP.json, see `replay`."""
  names = [name for name in ("loss", "masked_loss") if name in losses] or ["total"]
  columns = jax.device_get({name: losses[name] for name in names})
  largest = jnp.abs(draws.x0).max(axis=(1, 2, 3))
  t, labels, largest = jax.device_get((draws.t, labels, largest))
  return [
    {
      "index": index,
      "label": int(labels[i]),
      "t": t[i].item(),
      "largest": _number(largest[i]),
    }
    | {name: _number(columns[name][i]) for name in names}
    for i, index in enumerate(examples)
  ]


def _not_finite(tree: Any) -> list[str]:
  """Paths of the arrays that hold numbers that are not finite."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in flat])
  return [
    "/".join(str(key.key) for key in path)
    for (path, _), is_finite in zip(flat, finite, strict=True)
    if not is_finite
  ]


def _number(x: Any) -> float | None:
  """A float, or None for NaN and infinity, which JSON cannot hold."""
  return float(x) if np.isfinite(x) else None
