"""What a training step carries over to the next."""

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
    step: () int32.
    params: parameters, float32.
    opt_state: of the optax transformation.
    ema: decay as text -> average of the parameters.
    loss_history: of the loss-second-moment timestep sampler, else None.
    batch_offset: () int32; step n takes batch n + batch_offset of the data. It grows
      where a run goes back and leaves batches out.
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
  """The state before the first step; every average starts at the parameters.

  Args:
    key: random key of the parameters.
    model: the network.
    optimizer: whose state is initialised.
    ema_decays: decay of each average.
    timestep_sampler: whose loss history is initialised.
  """
  params = init_params(model, key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema={str(decay): jax.tree.map(jnp.copy, params) for decay in ema_decays},
    loss_history=timestep_sampler.init(),
    batch_offset=jnp.zeros((), jnp.int32),
  )
