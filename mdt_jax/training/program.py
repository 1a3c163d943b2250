"""The compiled functions of a run: the first state and the training step on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from mdt_jax import sharding
from mdt_jax.experiment import Experiment
from mdt_jax.train_state import TrainState, init_state, start_state
from mdt_jax.training.loss_by_time import NUM_TIME_BINS
from mdt_jax.training.step import TrainStep, make_train_step
from mdt_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of a run; call and lower them inside `use_mesh(mesh)`.

  Attributes:
    mesh: devices of the run.
    state: a `TrainState` of jax.ShapeDtypeStruct: shape, dtype and sharding of each
      array.
    init: random key -> first state, created in its sharding.
    start: parameters in the sharding of `state.params` -> first state. The function
      donates the parameters.
    step: the jitted function of `make_train_step`. The function donates the old state:
      do not use the old state after a call.
  """

  mesh: Mesh
  state: TrainState
  init: Callable[[jax.Array], TrainState]
  start: Callable[[Params], TrainState]
  step: TrainStep


def make_program(experiment: Experiment) -> Program:
  """Builds the compiled functions of a run; compilation happens at the first call."""
  settings, mesh = experiment.settings, experiment.mesh
  parts = dict(
    optimizer=experiment.optimizer,
    ema_decays=settings.ema_decays,
    timestep_sampler=experiment.objective.timestep_sampler,
  )
  init = functools.partial(init_state, model=experiment.model, **parts)
  start = functools.partial(start_state, **parts)
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.of_state(mesh, shapes)
  train_step = make_train_step(
    experiment.model,
    experiment.objective,
    experiment.optimizer,
    seed=settings.seed,
    ema_decays=settings.ema_decays,
    ema_warmup=settings.ema_warmup,
    ema_every=settings.ema_every,
    frozen=experiment.frozen,
    accumulation_steps=settings.accumulation_steps,
    learning_rate=experiment.learning_rate,
    num_time_bins=NUM_TIME_BINS if settings.log.loss_by_time_every else 0,
    mesh=mesh,
  )
  return Program(
    mesh=mesh,
    state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    ),
    init=jax.jit(init, out_shardings=shardings),
    start=jax.jit(start, out_shardings=shardings, donate_argnums=0),
    step=jax.jit(
      train_step,
      static_argnames="static",
      donate_argnames="state",
      out_shardings=(shardings, sharding.replicated(mesh)),
    ),
  )
