"""The training step: random draws, gradient, update and parameter averages.

All random numbers of a step derive from (seed, step) and are drawn for the whole batch
at once. So a step can be replayed, and its result does not depend on the number of
devices or of accumulation steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mdt_jax import sharding
from mdt_jax.errors import SettingError
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Draws, Objective
from mdt_jax.objectives.objective import Losses
from mdt_jax.optimizers import Schedule
from mdt_jax.parameter_groups import is_frozen
from mdt_jax.pretrained.tensors import flatten, unflatten
from mdt_jax.train_state import TrainState
from mdt_jax.types import Array, Batch, Params

# Name -> (2,) float32: (sum over samples, number of samples). LOSS_BY_TIME, however, is
# (2, bins): for each bin of times, the sum of weighted losses and the sum of weights.
# Metrics of several steps can be added.
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch, Hashable], tuple[TrainState, Metrics]]

NUM_QUARTILES = 4  # of the times, for the losses by quartile
LOSS_BY_TIME = "loss_by_time"


def step_key(seed: int, step: Array) -> Array:
  """The random key of a step, from which all random numbers of the step derive."""
  return jax.random.fold_in(jax.random.key(seed), step)


def make_train_step(
  model: Model,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  ema_decays: Iterable[float],
  ema_warmup: bool = False,
  ema_every: int = 1,
  frozen: Collection[str] | None = None,
  accumulation_steps: int = 1,
  learning_rate: Schedule | None = None,
  num_time_bins: int = 0,
  mesh: Mesh | None = None,
) -> TrainStep:
  """Builds the training step.

  Jit the step with `static` as a static argument, and donate the state.

  Args:
    model: the network.
    objective: draws the random numbers of a step and computes the loss.
    optimizer: turns gradients into updates of the parameters.
    seed: seed of all random numbers; the key of a step is `step_key(seed, step)`.
    ema_decays: decays of the averages in the state, in (0, 1).
    ema_warmup: whether the decay d of step n = 0, 1, … is min(d, (1 + n) / (10 + n)).
    ema_every: E, steps between updates of the averages, each with the decay d^E: the
      steps n = E - 1, 2 E - 1, … update them.
    frozen: paths, or names of top-level parameters, that the optimizer does not update.
      They do not count in the metric "gradient_norm", and their averages equal them;
      None for those of the network.
    accumulation_steps: number of equal parts of the batch that are computed one after
      another, to save memory; must divide the batch size.
    learning_rate: schedule, for the metric "learning_rate" only.
    num_time_bins: number of equal parts of the times, for the metric "loss_by_time"; 0
      for no such metric.
    mesh: devices of the step, which then sums gradients with the least traffic; see
      `sharding.mean_over_data`. None: XLA decides.

  Returns:
    (state, batch, static) -> (state, metrics), where `static` is one of
    `objective.static_choices`. The metrics are losses, losses by quartile of the times
    ("loss_q0" to "loss_q3"), "gradient_norm", "learning_rate" and "skipped", and
    "loss_by_time", the loss that is minimised by bin of the times. If the
    loss or the gradient norm is not finite, the step is skipped: only the step number
    of the state changes, "skipped" counts the step, and the other metrics omit it.
  """

  frozen = model.frozen if frozen is None else frozen

  def gradients_of(
    params: Params, draws: Draws, static: Hashable
  ) -> tuple[Params, Losses]:
    def loss(params: Params, draws: Draws) -> tuple[Array, Losses]:
      found = objective.loss(model.apply, params, draws, static)
      _check_loss(objective, found, len(draws.x0))
      return found

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

  def weight_of(decay: float, step: Array) -> float | Array:
    """The weight of the parameters in an average with this decay."""
    if not ema_warmup:
      return 1 - decay**ema_every
    return 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step)) ** ema_every

  def average(params: Params, old: Params, decay: float, step: Array) -> Params:
    """The next average. That of frozen parameters would drift by rounding alone."""
    found = optax.incremental_update(params, old, weight_of(decay, step))
    if not frozen:
      return found
    flat = flatten(params)
    return unflatten(
      {k: flat[k] if is_frozen(k, frozen) else v for k, v in flatten(found).items()}
    )

  def train_step(
    state: TrainState, batch: Batch, static: Hashable
  ) -> tuple[TrainState, Metrics]:
    draws = objective.draw(step_key(seed, state.step), batch, state.loss_history)
    compute = functools.partial(gradients_of, static=static)
    if mesh is not None:
      compute = sharding.mean_over_data(compute, mesh)
    gradients, losses = compute(state.params, draws)
    total = losses.pop("total")
    weighted = {name: loss * draws.weights for name, loss in losses.items()}
    quartile = objective.process.time_bin(draws.t, NUM_QUARTILES)
    metrics = _loss_metrics(weighted, quartile)
    if num_time_bins:
      time_bin = objective.process.time_bin(draws.t, num_time_bins)
      metrics[LOSS_BY_TIME] = _sums_by_bin(
        total, draws.weights, time_bin, num_time_bins
      )
    norm = optax.tree.norm(_trained(gradients, frozen))
    metrics["gradient_norm"] = jnp.stack([norm, 1.0])
    if learning_rate is not None:
      metrics["learning_rate"] = jnp.stack(
        [jnp.asarray(learning_rate(state.step)), 1.0]
      )
    finite = jnp.isfinite(total.mean()) & jnp.isfinite(norm)
    metrics = {name: jnp.where(finite, value, 0) for name, value in metrics.items()}
    metrics["skipped"] = jnp.stack([1.0 - finite, 1.0])

    def averages(params: Params, old: dict[str, Params]) -> dict[str, Params]:
      return {
        str(decay): average(params, old[str(decay)], decay, state.step)
        for decay in ema_decays
      }

    def update(state: TrainState) -> TrainState:
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
      history = objective.timestep_sampler.update(state.loss_history, draws.t, total)
      return state.replace(
        params=params,
        opt_state=opt_state,
        ema=averages(params, state.ema) if ema_every == 1 else state.ema,
        loss_history=history,
      )

    state = jax.lax.platform_dependent(
      state,
      cuda=functools.partial(_choose, finite, update),
      default=functools.partial(_branch, finite, update),
    )
    if ema_every > 1:
      is_due = finite & ((state.step + 1) % ema_every == 0)
      state = state.replace(ema=_update_averages(is_due, averages, state))
    return state.replace(step=state.step + 1), metrics

  return train_step


def add_metrics(first: Metrics, second: Metrics) -> Metrics:
  """Adds two metrics, which gives the metrics of the samples of both.

  A metric may be in one of them alone: the phases of a run may have different losses.
  """
  common = {name: first[name] + second[name] for name in first if name in second}
  return {**first, **second, **common}


def mean_metrics(metrics: Metrics) -> dict[str, float]:
  """Means over the samples, on the host; omits metrics without samples.

  A metric has no samples if a quartile is empty or all steps were skipped. The metric
  "loss_by_time" is no single number and is omitted too.
  """
  host = jax.device_get({k: v for k, v in metrics.items() if k != LOSS_BY_TIME})
  return {name: float(s / n) for name, (s, n) in host.items() if n > 0}


# Two ways to update a donated state in place, if a condition holds. For `_choose`, XLA
# for CPUs and TPUs copies parts of the state. For `_branch`, XLA for NVIDIA's GPUs
# copies all of it: 22 GB in each step of DiT-XL/2.


def _branch(
  condition: Array, update: Callable[[TrainState], TrainState], state: TrainState
) -> TrainState:
  """Updates the state in a branch of the program."""
  return jax.lax.cond(condition, update, lambda state: state, state)


def _choose(
  condition: Array, update: Callable[[TrainState], TrainState], state: TrainState
) -> TrainState:
  """Updates the state, and chooses between the new and the old value of each number."""
  choose = functools.partial(jnp.where, condition)
  return jax.tree.map(choose, update(state), state)


def _update_averages(
  is_due: Array,
  averages: Callable[[Params, dict[str, Params]], dict[str, Params]],
  state: TrainState,
) -> dict[str, Params]:
  """Returns the next averages if they are due, else the old ones; in place if donated.

  A loop of one turn or none, because XLA for GPUs copies the result of a branch. The
  barrier keeps XLA from moving the products with the parameters in front of the loop,
  where each step would compute and store them.
  """

  def turn(_: Any, old: dict[str, Params]) -> dict[str, Params]:
    return averages(*jax.lax.optimization_barrier((state.params, old)))

  return jax.lax.fori_loop(0, is_due.astype(jnp.int32), turn, state.ema)


def _trained(gradients: Params, frozen: Collection[str]) -> Params:
  """Leaves out the gradients of frozen parameters."""
  kept = {k: g for k, g in flatten(gradients).items() if not is_frozen(k, frozen)}
  return unflatten(kept)


def _check_loss(objective: Objective, found: Any, batch_size: int) -> None:
  """Raises SettingError if an objective returns anything but a loss and its parts."""
  try:
    total, losses = found
    shapes = {name: jnp.shape(loss) for name, loss in losses.items()}
    fits = jnp.shape(total) == () and set(shapes.values()) == {(batch_size,)}
  except (AttributeError, TypeError, ValueError):
    shapes, fits = {}, False
  if not fits or "total" not in shapes:
    raise SettingError(
      "objective",
      type(objective).__name__,
      'loss must return (scalar, {name: (B,) losses, "total": (B,) losses}), with '
      f"B = {batch_size}; the losses have the shapes {shapes}",
    )


def _loss_metrics(losses: Losses, quartile: Array) -> Metrics:
  """The metrics of each loss (B,): over all times, and for each quartile of times."""
  metrics = {}
  for name, loss in losses.items():
    metrics[name] = jnp.stack([loss.sum(), jnp.float32(loss.shape[0])])
    if not name.endswith("loss"):
      continue
    for q in range(NUM_QUARTILES):
      inside = (quartile == q).astype(jnp.float32)
      metrics[f"{name}_q{q}"] = jnp.stack([(loss * inside).sum(), inside.sum()])
  return metrics


def _sums_by_bin(losses: Array, weights: Array, bins: Array, count: int) -> Array:
  """The sums (2, count) of weighted losses (B,), and of weights (B,), in each bin.

  Their ratio is the mean loss at the times of the bin, also if the timestep sampler
  draws some times more often than others: the weights undo that.
  """
  inside = bins[:, None] == jnp.arange(count)
  values = jnp.stack([losses * weights, weights])
  return jnp.where(inside, values[..., None], 0).sum(axis=1)


def _split(x: Array, parts: int) -> Array:
  """(B, …) -> (parts, B / parts, …): part i holds samples i, i + parts, i + 2 parts, ….

  Neighbouring samples lie on the same device. They go to different parts, so each part
  is spread over all devices like the batch.
  """
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array) -> Array:
  """The inverse of `_split`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
