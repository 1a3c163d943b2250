"""One step of a run once more, looked at closely: what made its loss not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories, sharding
from mdt_jax.atomic import write_json
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.data.loader import batch_indices, create_loader
from mdt_jax.errors import SettingError
from mdt_jax.training.lock import locked
from mdt_jax.training.program import make_program
from mdt_jax.training.step import Draws, draw, step_loss

logger = logging.getLogger("mdt_jax")


def replay(config: ConfigDict, workdir: str | Path, step: int) -> dict[str, Any]:
  """Goes from the last checkpoint before a step to it, bit for bit, and looks at it.

  Args:
    config: of the run.
    workdir: of the run; takes replay_STEP.json, and nothing else in it changes.
    step: counted from 0; from the first step on where no checkpoint is old enough.

  Returns:
    What replay_STEP.json holds: "loss", the names of "parameters" and "gradients" that
    are not finite, and "examples", each with "index" in the training data, "label",
    "t", "largest" absolute value of x0, "loss" and "masked_loss". What is not finite is
    null there, and None here.

  Raises:
    SettingError: the step is not one of the run, or the workdir is none of it.
  """
  settings.check(config, jax.device_count())
  if jax.process_count() > 1:
    raise SettingError("--replay_step", step, "takes one process")
  if not 0 <= step < config.num_steps:
    raise SettingError(
      "--replay_step", step, f"must lie in [0, config.num_steps = {config.num_steps})"
    )
  workdir = Path(workdir).expanduser().absolute()
  if not workdir.is_dir():
    raise SettingError("--workdir", str(workdir), "must be the folder of a run")
  mesh = sharding.make_mesh(**config.mesh)
  autoencoder = factories.make_autoencoder(config, sharding.replicated(mesh))
  source = factories.make_source(config, autoencoder)
  kept_lengths = factories.kept_lengths(config)
  program = make_program(config, mesh)
  with locked(workdir), sharding.use_mesh(mesh):
    saved = Checkpoints(workdir, config.checkpoints_to_keep)
    if saved.latest_step(step) is None:
      state = program.init(jax.random.key(config.seed))
    else:
      state = saved.restore(program.state, config, until=step)
    saved.close()
    offset = int(state.batch_offset)
    logger.info("replaying steps %d to %d", int(state.step), step)
    batches = create_loader(
      source,
      seed=config.seed,
      batch_size=config.batch_size,
      flip=config.data.flip,
      start_step=int(state.step) + offset,
      rows=sharding.local_rows(mesh, config.batch_size),
    )
    while True:
      n = int(state.step)
      batch = sharding.put_batch(next(batches), mesh, config.batch_size)
      if factories.encodes_images(config):
        batch["moments"] = autoencoder.moments(batch.pop("image"))
      num_keep = kept_lengths.draw(config.seed, n) if kept_lengths else None
      if n == step:
        break
      state, _ = program.step(state, batch, num_keep)
    loss, losses, gradients, draws = _looker(config)(state, batch, num_keep)
    examples = batch_indices(len(source), config.seed, config.batch_size, n + offset)
    found = {
      "step": step,
      "batch": step + offset,
      "kept_tokens": num_keep,
      "loss": _number(loss),
      "parameters": _not_finite(state.params),
      "gradients": _not_finite(gradients),
      "examples": _rows(examples, batch["label"], draws, losses),
    }
  path = workdir / f"replay_{step}.json"
  write_json(path, found)
  logger.info(
    "step %d, batch %d: loss %s; not finite: %d parameters, %d gradients, and the "
    "losses of %d of %d examples; more in %s",
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


def _looker(config: ConfigDict) -> Callable[..., Any]:
  model, diffusion = factories.make_model(config), factories.make_diffusion(config)
  timestep_sampler = factories.make_timestep_sampler(config)

  def look(state, batch, num_keep):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    draws = draw(key, batch, model, timestep_sampler, state.loss_history)
    (loss, (losses, _)), gradients = jax.value_and_grad(
      lambda params: step_loss(model, diffusion, params, draws, num_keep), has_aux=True
    )(state.params)
    return loss, losses, gradients, draws

  return jax.jit(look, static_argnums=2)


def _rows(
  examples: list[int], labels: jax.Array, draws: Draws, losses: dict[str, jax.Array]
) -> list[dict[str, Any]]:
  """One for each example of the batch."""
  names = [name for name in ("loss", "masked_loss") if name in losses]
  columns = jax.device_get({name: losses[name] for name in names})
  largest = jnp.abs(draws.x0).max(axis=(1, 2, 3))
  t, labels, largest = jax.device_get((draws.t, labels, largest))
  return [
    {
      "index": index,
      "label": int(labels[i]),
      "t": int(t[i]),
      "largest": _number(largest[i]),
    }
    | {name: _number(columns[name][i]) for name in names}
    for i, index in enumerate(examples)
  ]


def _not_finite(tree: Any) -> list[str]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  finite = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in flat])
  return [
    "/".join(str(key.key) for key in path)
    for (path, _), is_finite in zip(flat, finite, strict=True)
    if not is_finite
  ]


def _number(x: Any) -> float | None:
  return float(x) if np.isfinite(x) else None
