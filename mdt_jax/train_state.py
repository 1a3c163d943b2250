"""The state of training, which a training step updates."""

from __future__ import annotations

from collections.abc import Iterable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mdt_jax.diffusion.timestep_samplers import LossHistory, TimestepSampler
from mdt_jax.models.registry import Model, init_params
from mdt_jax.types import Array, Params


class TrainState(flax.struct.PyTreeNode):
  """State of a run after `step` steps.

  Attributes:
    step: () int32, number of finished steps.
    params: parameters of the network, float32.
    opt_state: state of the optax optimizer.
    ema: decay as a string, such as "0.9999" -> exponential moving average of the
      parameters.
    loss_history: state of the timestep sampler "loss-second-moment"; None for
      "uniform".
    batch_offset: () int32. Step n trains on batch n + batch_offset of the data. The
      offset grows when a run returns to a checkpoint and skips batches.
  """

  step: Array
  params: Params
  opt_state: Params
  ema: dict[str, Params]
  loss_history: LossHistory | None
  batch_offset: Array


def init_state(
  key: Array,
  model: Model,
  optimizer: optax.GradientTransformation,
  ema_decays: Iterable[float],
  timestep_sampler: TimestepSampler,
) -> TrainState:
  """Initialises the state; each average starts as a copy of the parameters.

  Args:
    key: random key for the parameters.
    model: the network.
    optimizer: the optimizer.
    ema_decays: decay of each average.
    timestep_sampler: the timestep sampler.
  """
  return start_state(init_params(model, key), optimizer, ema_decays, timestep_sampler)


def start_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  ema_decays: Iterable[float],
  timestep_sampler: TimestepSampler,
) -> TrainState:
  """Returns the state of a run that starts from `params`; see `init_state`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays},
    loss_history=timestep_sampler.init(),
    batch_offset=jnp.zeros((), jnp.int32),
  )
