"""Sampling that also returns what the network predicts on the way from noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.diffusion.loops import make_loop
from mdt_jax.diffusion.process import Process
from mdt_jax.types import Array


def sample_with_predictions(
  model_fn: ModelFn,
  diffusion: Process,
  x_T: Array,
  key: Array,
  calls: Sequence[int],
  **options: Any,
) -> Float[Array, "B calls+1 H W C"]:
  """Samples x_0 as `samplers.sample` does, and keeps some predictions of x0.

  The predictions are further outputs of the same loop: no call of the network is added.

  Args:
    model_fn, diffusion, x_T, key: see `samplers.sample`.
    calls: increasing numbers of the network calls, from 0, whose predicted x0 is kept.
    **options: options of `loops.make_loop`.

  Returns:
    The predictions, in the order of `calls`, and then x_0.

  Raises:
    SettingError: see `loops.make_loop`; the samplers in time have no separate calls.
  """
  loop = make_loop(diffusion, x_T, key, **options)
  # Row of each call in the kept predictions. Writes to the row len(calls), which does
  # not exist, are dropped.
  places = np.full(len(loop.steps), len(calls), np.int32)
  places[list(calls)] = np.arange(len(calls))

  def call_network(carry: tuple[Any, Array], inputs: tuple[Any, Array]) -> Any:
    (state, kept), (row, place) = carry, inputs
    x, t = loop.prepare(state, row)
    output = model_fn(x, diffusion.network_time(t)).astype(jnp.float32)
    state, x0 = loop.update(state, row, x, t, output)
    return (state, kept.at[:, place].set(x0, mode="drop")), None

  rows = loop.rows, jnp.asarray(places)
  kept = jnp.zeros((x_T.shape[0], len(calls), *x_T.shape[1:]), jnp.float32)
  (state, kept), _ = jax.lax.scan(call_network, (loop.state, kept), rows)
  return jnp.concatenate([kept, loop.latent(state)[:, None]], axis=1)
