"""What is compiled for a run: its first state and its step, laid out on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from mdt_jax import sharding
from mdt_jax.experiment import Experiment
from mdt_jax.train_state import TrainState, init_state
from mdt_jax.training.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled functions of a run; call and lower them inside `use_mesh(mesh)`.

  Attributes:
    mesh: devices of the run.
    state: shape, type and sharding of each array of the state.
    init: random key -> first state; no device ever holds more than its part.
    step: of `make_train_step`, jitted; the old state is given up.
  """

  mesh: Mesh
  state: TrainState
  init: Callable[[jax.Array], TrainState]
  step: TrainStep


def make_program(experiment: Experiment) -> Program:
  """The program of a run on its mesh."""
  settings, mesh = experiment.settings, experiment.mesh
  init = functools.partial(
    init_state,
    model=experiment.model,
    optimizer=experiment.optimizer,
    ema_decays=settings.ema_decays,
    timestep_sampler=experiment.objective.timestep_sampler,
  )
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.of_state(mesh, shapes)
  train_step = make_train_step(
    experiment.model,
    experiment.objective,
    experiment.optimizer,
    seed=settings.seed,
    ema_decays=settings.ema_decays,
    accumulation_steps=settings.accumulation_steps,
    learning_rate=experiment.learning_rate,
  )
  return Program(
    mesh=mesh,
    state=jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      shardings,
    ),
    init=jax.jit(init, out_shardings=shardings),
    step=jax.jit(
      train_step,
      static_argnames="static",
      donate_argnames="state",
      out_shardings=(shardings, sharding.replicated(mesh)),
    ),
  )
