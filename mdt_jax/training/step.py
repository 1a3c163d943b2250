"""The training step: draws, gradient, update and averages, for any objective.

Every random number of a step derives from (seed, step) and is drawn for the whole
batch at once. So a step can be replayed, and has the same result on any number of
devices and in any number of accumulated parts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import jax
import jax.numpy as jnp
import optax

from mdt_jax.models.registry import Model
from mdt_jax.objectives import Draws, Objective
from mdt_jax.objectives.objective import Losses
from mdt_jax.optimizers import Schedule
from mdt_jax.train_state import TrainState
from mdt_jax.types import Array, Batch, Params

# Name -> (2,) float32: a sum over samples and their number, so that metrics of
# several steps add up.
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, Hashable], tuple[TrainState, Metrics]]

NUM_QUARTILES = 4


def step_key(seed: int, step: Array) -> Array:
  """The random key that all draws of a step derive from."""
  return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
  model: Model,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  ema_decays: Iterable[float],
  accumulation_steps: int = 1,
  learning_rate: Schedule | None = None,
) -> TrainStep:
  """Builds the step, to be jitted with `static` static and the state donated.

  Args:
    model: the network.
    objective: the draws and the loss of a step.
    optimizer: turns gradients into updates.
    seed: of all random draws, with the step.
    ema_decays: decays of the averages in the state.
    accumulation_steps: parts of the batch, one after another; less memory.
    learning_rate: schedule, only to report it.

  Returns:
    (state, batch, static) -> (state, metrics), where `static` is one of
    `objective.static_choices`. A step whose loss or gradient is not finite changes the
    step number alone; the metric "skipped" counts the step, and the other metrics leave
    it out.
  """

  def gradients_of(
    params: Params, draws: Draws, static: Hashable
  ) -> tuple[Params, Losses]:
    def loss(params: Params, draws: Draws) -> tuple[Array, Losses]:
      return objective.loss(model.apply, params, draws, static)

    grad_fn = jax.grad(loss, has_aux=True)
    if accumulation_steps == 1:
      return grad_fn(params, draws)

    def body(total_gradients: Params, part: Draws) -> tuple[Params, Losses]:
      gradients, losses = grad_fn(params, part)
      return jax.tree.map(jnp.add, total_gradients, gradients), losses

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = jax.tree.map(lambda x: _split(x, accumulation_steps), draws)
    gradients, losses = jax.lax.scan(body, zeros, parts)
    gradients = jax.tree.map(lambda g: g / accumulation_steps, gradients)
    return gradients, jax.tree.map(_join, losses)

  def train_step(
    state: TrainState, batch: Batch, static: Hashable
  ) -> tuple[TrainState, Metrics]:
    draws = objective.draw(step_key(seed, state.step), batch, state.loss_history)
    gradients, losses = gradients_of(state.params, draws, static)
    total = losses.pop("total")
    weighted = {name: loss * draws.weights for name, loss in losses.items()}
    metrics = _loss_metrics(weighted, draws.t, objective.process.end_time)
    trained = {k: g for k, g in gradients.items() if k not in model.frozen}
    norm = optax.tree.norm(trained)
    metrics["gradient_norm"] = jnp.stack([norm, 1.0])
    if learning_rate is not None:
      metrics["learning_rate"] = jnp.stack(
        [jnp.asarray(learning_rate(state.step)), 1.0]
      )
    finite = jnp.isfinite(total.mean()) & jnp.isfinite(norm)
    metrics = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
    metrics["skipped"] = jnp.stack([1.0 - finite, 1.0])

    def update(state: TrainState) -> TrainState:
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      return state.replace(
        params=params,
        opt_state=opt_state,
        ema={
          str(decay): optax.incremental_update(params, state.ema[str(decay)], 1 - decay)
          for decay in ema_decays
        },
        loss_history=objective.timestep_sampler.update(
          state.loss_history, draws.t, total
        ),
      )

    # A branch, not a choice for each number: nothing of the old state outlives the
    # update, so that XLA writes the new one over it, without copies.
    state = jax.lax.cond(finite, update, lambda state: state, state)
    return state.replace(step=state.step + 1), metrics

  return train_step


def add_metrics(first: Metrics, second: Metrics) -> Metrics:
  """Metrics over the samples of both."""
  return jax.tree.map(jnp.add, first, second)


def mean_metrics(metrics: Metrics) -> dict[str, float]:
  """Means over the samples, on the host; a quartile without samples is left out."""
  host = jax.device_get(metrics)
  return {name: float(s / n) for name, (s, n) in host.items() if n > 0}


def _loss_metrics(losses: Losses, t: Array, end_time: float) -> Metrics:
  """Sums of the losses, and of those of each quartile of the times."""
  quartile = NUM_QUARTILES * t // end_time
  metrics = {}
  for name, loss in losses.items():
    metrics[name] = jnp.stack([loss.sum(), jnp.float32(loss.shape[0])])
    if not name.endswith("loss"):
      continue
    for q in range(NUM_QUARTILES):
      inside = (quartile == q).astype(jnp.float32)
      metrics[f"{name}_q{q}"] = jnp.stack([(loss * inside).sum(), inside.sum()])
  return metrics


def _split(x: Array, parts: int) -> Array:
  """(B, …) -> (parts, B / parts, …): part i holds every parts-th sample from i.

  Neighbouring samples, which lie on one device, go to different parts, so that each
  part is sharded over the devices as the batch is.
  """
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array) -> Array:
  """The inverse of `_split`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
