"""Optimizers (Adan, AdamW and others of optax) and learning-rate schedules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from mdt_jax.clipping import clip_by_global_norm, clip_by_norms_of_shards
from mdt_jax.errors import (
  SettingError,
  check_arguments,
  check_choice,
  named_in_errors,
)
from mdt_jax.parameter_groups import with_rates, without_frozen
from mdt_jax.types import Array, Params

# Number of finished steps -> learning rate.
Schedule: TypeAlias = optax.Schedule

SCHEDULES = ("constant", "cosine", "linear")
# Arguments of optimizers that are fields of `config.optimizer`.
SHARED = ("b1", "b2", "b3", "eps", "weight_decay")


def learning_rate_schedule(
  name: str, learning_rate: float, num_steps: int, warmup_steps: int = 0
) -> Schedule:
  """Builds a learning-rate schedule.

  Args:
    name: "constant", or "linear" or "cosine" decay to zero at `num_steps`.
    learning_rate: peak learning rate.
    num_steps: number of steps of the run.
    warmup_steps: number of first steps in which the learning rate rises linearly from
      zero to the peak; in [0, num_steps).

  Raises:
    SettingError: the name is unknown, or `warmup_steps` is out of range.
  """
  check_choice("schedule", name, SCHEDULES)
  if not 0 <= warmup_steps < num_steps:
    raise SettingError(
      "warmup_steps", warmup_steps, f"must lie in [0, num_steps = {num_steps})"
    )
  decay_steps = num_steps - warmup_steps
  after = {
    "constant": optax.constant_schedule(learning_rate),
    "linear": optax.linear_schedule(learning_rate, 0.0, decay_steps),
    "cosine": optax.cosine_decay_schedule(learning_rate, decay_steps),
  }[name]
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def bias_correction(decay: float, count: Array) -> Array:
  """Computes 1 - decay^count, the weight of all gradients in an average from zero.

  For a decay of 0.999, 1 - 0.999 ** count in float32, as in optax, is off by 1.3e-5 at
  the first step, and a step of AdamW by half of that. PyTorch uses float64.

  Args:
    decay: in [0, 1).
    count: () int32, number of gradients.

  Returns:
    () float32.
  """
  return -jnp.expm1(count * (math.log(decay) if decay else -jnp.inf))


class AdanState(NamedTuple):
  """State of Adan; each tree has the structure and shapes of the parameters."""

  count: Array  # () int32, finished steps  # pyright: ignore[reportIncompatibleMethodOverride]
  mean: Params  # m, of the gradient
  difference: Params  # v, of the change of the gradient
  square: Params  # n, of the squared look-ahead gradient
  last_gradient: Params


def adan(
  learning_rate: float | Schedule,
  b1: float = 0.98,
  b2: float = 0.92,
  b3: float = 0.99,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """Adan (arXiv 2208.06677) as in the released training code of MDTv2.

  Differences to `optax.adan`: the first gradient difference is zero and counts in its
  average; `eps` is added outside the square root; weight decay is proximal,
  p <- (p + update) / (1 + learning_rate * weight_decay).

  Args:
    learning_rate: a number or a schedule.
    b1: decay of the average of gradients.
    b2: decay of the average of gradient differences.
    b3: decay of the average of squared look-ahead gradients.
    eps: added to the denominator.
    weight_decay: factor of the proximal weight decay.

  Returns:
    A gradient transformation. Its `update` raises ValueError if called without the
    parameters.
  """

  def init(params: Params) -> AdanState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdanState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros)

  def update(
    gradients: Params, state: AdanState, params: Params | None = None
  ) -> tuple[Params, AdanState]:
    if params is None:
      raise ValueError("adan needs the parameters: its weight decay is proximal")
    count = state.count + 1
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    change = jax.tree.map(
      lambda g, last: jnp.where(count == 1, 0, g - last),
      gradients,
      state.last_gradient,
    )
    ahead = jax.tree.map(lambda g, d: g + b2 * d, gradients, change)
    mean = optax.tree.update_moment(gradients, state.mean, b1, 1)
    difference = optax.tree.update_moment(change, state.difference, b2, 1)
    square = optax.tree.update_moment(ahead, state.square, b3, 2)
    correction1, correction2, correction3 = (
      bias_correction(b, count) for b in (b1, b2, b3)
    )

    def step(p: Array, m: Array, v: Array, n: Array) -> Array:
      denominator = jnp.sqrt(n) / jnp.sqrt(correction3) + eps
      move = m / correction1 + b2 * v / correction2
      return (p - rate * move / denominator) / (1 + rate * weight_decay) - p

    updates = jax.tree.map(step, params, mean, difference, square)
    return updates, AdanState(count, mean, difference, square, gradients)

  return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def adamw(
  learning_rate: float | Schedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_root: float = 0.0,
  mu_dtype: Any = None,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """AdamW with the arguments and the state of `optax.adamw`, and steps as PyTorch's.

  The only difference is `bias_correction`.
  """
  moments = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

  def update(
    gradients: Params, state: optax.OptState, params: Params | None = None
  ) -> tuple[Params, optax.OptState]:
    del params
    assert isinstance(state, optax.ScaleByAdamState)
    # Before it is rounded to `mu_dtype`, as in optax.
    mean = optax.tree.update_moment(gradients, state.mu, b1, 1)
    _, state = moments.update(gradients, state)  # XLA leaves the unused step out.
    assert isinstance(state, optax.ScaleByAdamState)
    count: Any = state.count
    correction1, correction2 = (bias_correction(b, count) for b in (b1, b2))
    # (weight of the average, weight of the gradient) in the corrected average
    average, last = 1 / correction1, 0.0
    if nesterov:
      average, last = b1 / bias_correction(b1, count + 1), (1 - b1) / correction1

    def step(m: Array, n: Array, g: Array) -> Array:
      numerator = average * m + (last * g if nesterov else 0)
      return numerator / (jnp.sqrt(n / correction2 + eps_root) + eps)

    return jax.tree.map(step, mean, state.nu, gradients), state

  return optax.chain(
    optax.GradientTransformation(moments.init, update),  # pyright: ignore[reportArgumentType]
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def create_optimizer(
  name: str,
  learning_rate: float | Schedule,
  *,
  b1: float | None = None,
  b2: float | None = None,
  b3: float | None = None,
  eps: float | None = None,
  weight_decay: float = 0.0,
  clip_norm: float | None = None,
  clip_shards: Mapping[str, Int[np.ndarray, "..."]] | None = None,
  frozen: Collection[str] = (),
  rates: Mapping[str, float] | None = None,
  peak: float | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
  """Builds the optimizer of a run.

  Args:
    name: "adamw" (MDT v1 and DiT), "adan" (MDTv2), or an optimizer of optax, such as
      "lion".
    learning_rate: a number or a schedule.
    b1, b2, b3: decays of the averages, in [0, 1). None for the optimizer's defaults:
      (0.9, 0.999) for AdamW and (0.98, 0.92, 0.99) for Adan, as in the papers.
    eps: added to the denominator, and to the gradient norm in clipping. None for the
      optimizer's default (1e-8 for AdamW and Adan) and for 1e-8 in clipping.
    weight_decay: factor of the weight decay. It is passed to each optimizer with weight
      decay, even if 0.
    clip_norm: largest global norm of the gradients of trained parameters; None for no
      clipping.
    clip_shards: limits the norm of each shard of the parameters alone, see
      `clip_by_norms_of_shards`; None for the norm of all.
    frozen: paths, or names of top-level parameters, of what is not updated.
    rates: path of a parameter -> its own largest learning rate; its schedule is that of
      the others. None or empty: all parameters have the same.
    peak: largest value of `learning_rate`; needed with `rates`.
    arguments: further arguments of the optimizer's function, such as {"momentum": 0.9}
      for "sgd".

  Raises:
    SettingError: the name is unknown, the optimizer does not have a setting, or a value
      is invalid.
  """
  function = _function(name)
  for setting, decay in dict(b1=b1, b2=b2, b3=b3).items():
    if decay is not None and not 0 <= decay < 1:
      raise SettingError(setting, decay, "must lie in [0, 1)")
  named = dict(b1=b1, b2=b2, b3=b3, eps=eps)
  given = {k: value for k, value in named.items() if value is not None}
  # Pass 0 too: optax.adamw and optax.lion have a nonzero default.
  if weight_decay or _takes(function, "weight_decay"):
    given["weight_decay"] = weight_decay
  check_arguments(function, {"learning_rate": learning_rate, **given}, name)

  def create(factor: float) -> optax.GradientTransformation:
    scaled = _scaled(learning_rate, factor)
    return _call(name, function, scaled, given, arguments or {})

  optimizer = with_rates(create, rates or {}, peak or 1.0)
  if clip_norm is not None:
    eps = 1e-8 if eps is None else eps
    if clip_shards is None:
      clip = clip_by_global_norm(clip_norm, eps)
    else:
      clip = clip_by_norms_of_shards(clip_norm, eps, clip_shards)
    optimizer = optax.chain(clip, optimizer)
  return without_frozen(optimizer, frozen)


def _scaled(learning_rate: float | Schedule, factor: float) -> float | Schedule:
  """A learning rate, or a schedule, times a factor."""
  if factor == 1:
    return learning_rate
  if callable(learning_rate):
    return lambda count: learning_rate(count) * factor
  return learning_rate * factor


# Name -> function (learning_rate, **settings) -> optimizer. `_function` looks up other
# names in optax.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": adamw,
  "adan": adan,
}


def _function(name: str) -> Callable[..., optax.GradientTransformation]:
  """Returns the function of an optimizer: an entry of OPTIMIZERS, or one of optax.

  Raises:
    SettingError: optax has no such function whose first argument is learning_rate.
  """
  if name in OPTIMIZERS:
    return OPTIMIZERS[name]
  function: Any = getattr(optax, name, None)
  is_public = inspect.isfunction(function) and not name.startswith(("_", "scale_by_"))
  if not is_public or next(iter(_parameters(function)), None) != "learning_rate":
    known = ", ".join(OPTIMIZERS)
    raise SettingError(
      "name", name, f"accepted are {known}, or an optimizer of optax such as lion, sgd"
    )
  return function


def _call(
  name: str,
  function: Callable[..., optax.GradientTransformation],
  learning_rate: float | Schedule,
  given: Mapping[str, Any],
  arguments: Mapping[str, Any],
) -> optax.GradientTransformation:
  """Calls an optimizer's function with settings (`given`) and further arguments.

  Raises:
    SettingError: an argument is unknown or is a setting, or the optimizer cannot train
      from gradients with this learning rate.
  """
  for argument, value in arguments.items():
    if argument in (*SHARED, "learning_rate"):
      raise SettingError(
        f"arguments.{argument}", value, f"must be given as the setting {argument}"
      )
    with named_in_errors("arguments"):
      check_arguments(function, {"learning_rate": learning_rate, argument: value}, name)
  if name in OPTIMIZERS and not arguments:
    return function(learning_rate, **given)
  try:
    optimizer = function(learning_rate, **given, **arguments)
    # Masks fit the parameters of the network, not the single one of `_try_a_step`.
    probed = {k: value for k, value in arguments.items() if "mask" not in k}
    _try_a_step(function(learning_rate, **given, **probed))
  except (TypeError, ValueError) as error:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    # Some optimizers accept no schedule, and some, such as lbfgs, need the loss.
    setting, value = ("arguments", dict(arguments)) if arguments else ("name", name)
    raise SettingError(setting, value, f"{name} cannot train: {reason}") from None
  return optimizer


def _try_a_step(optimizer: optax.GradientTransformation) -> None:
  """Traces one step on a small parameter; raises the optimizer's errors."""

  def step(params: Params) -> Any:
    return optimizer.update(params, optimizer.init(params), params)

  jax.eval_shape(step, {"parameter": jax.ShapeDtypeStruct((2, 2), jnp.float32)})


def _takes(function: Callable[..., Any], name: str) -> bool:
  """Returns whether a function accepts the keyword argument `name`."""
  parameters = _parameters(function)
  return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
  """Returns the parameters of a function's signature by name."""
  return inspect.signature(function).parameters
