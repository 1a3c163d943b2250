"""What is compiled for a run: its first state and its step, laid out on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import factories, sharding
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


def make_program(config: ConfigDict, mesh: Mesh) -> Program:
  """The program of a run that `mdt_jax.config.check` accepts."""
  model = factories.make_model(config)
  optimizer, learning_rate = factories.make_optimizer(config)
  timestep_sampler = factories.make_timestep_sampler(config)
  init = functools.partial(
    init_state,
    model=model,
    optimizer=optimizer,
    ema_decays=config.ema_decays,
    timestep_sampler=timestep_sampler,
  )
  shapes = jax.eval_shape(init, jax.random.key(0))
  shardings = sharding.of_state(mesh, shapes)
  train_step = make_train_step(
    model,
    factories.make_diffusion(config),
    optimizer,
    timestep_sampler,
    seed=config.seed,
    ema_decays=config.ema_decays,
    accumulation_steps=config.accumulation_steps,
    learning_rate=learning_rate,
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
      static_argnames="num_keep",
      donate_argnames="state",
      out_shardings=(shardings, sharding.replicated(mesh)),
    ),
  )
