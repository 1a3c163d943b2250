"""The interface of an objective: the random draws of a training step, and its loss.

The training step knows no objective. It draws a key from (seed, step), calls `draw`
for the whole batch and differentiates `loss`; gradients, accumulation over parts of a
batch, averages of the parameters and skipped steps are the same for all objectives.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.timestep_samplers import LossHistory, TimestepSampler
from mdt_jax.errors import SettingError, check_arguments, check_choice
from mdt_jax.models.flops import train_flops
from mdt_jax.models.registry import Model
from mdt_jax.types import Array, Batch, Params

# model.apply: ({"params": params}, x_t, t, y, token_mask) -> output
Apply = Callable[..., Any]
# Name -> (B,) loss of each sample. "total" is required: it is the loss of all passes.
Losses = dict[str, Array]


class Draws(flax.struct.PyTreeNode):
  """Samples of a batch with all that is random about them; the first axis is B.

  Attributes:
    x0: (B, H, W, C) float32 latents.
    t: (B,) times of the process, the same in all passes.
    weights: (B,) float32 of the losses, from the timestep sampler.
    noise: (B, passes, H, W, C) standard normal, one a pass.
    y: (B, passes, ...) conditions after dropping for guidance, one a pass.
    mask_noise: (B, L) uniform in [0, 1); the tokens of the largest are masked.
  """

  x0: Array
  t: Array
  weights: Array
  noise: Array
  y: Array
  mask_noise: Array


class Objective(abc.ABC):
  """Draws the random numbers of a step, and computes its loss.

  Args:
    model: the network, for its condition and its number of tokens; `loss` is given
      the function to apply.
    process: mixes data and noise.
    timestep_sampler: draws the times; uniform unless given.
  """

  # Passes of the network in a step. Every objective draws noise and conditions for at
  # least two, so that a run without a masked pass sees the same numbers as one with it.
  num_passes: ClassVar[int] = 2

  def __init__(
    self,
    model: Model,
    process: Process,
    timestep_sampler: TimestepSampler | None = None,
  ):
    self.model = model
    self.process = process
    self.timestep_sampler = timestep_sampler or TimestepSampler("uniform", process)

  @property
  def static_choices(self) -> Sequence[Hashable]:
    """What `loss` may be given as `static`, in increasing order of memory.

    The step is compiled once for each.
    """
    return (None,)

  def choose_static(self, seed: int, step: int) -> Hashable:
    """One of `static_choices` for a step, the same on every host, at any time."""
    del seed, step
    return self.static_choices[0]

  @property
  def largest_static(self) -> Hashable:
    """The one of `static_choices` that takes the most memory."""
    return self.static_choices[-1]

  def flops(self, static: Hashable) -> float:
    """Floating-point operations of a training step on one image, see `models.flops`."""
    del static
    return train_flops(self.model)

  @property
  def summary(self) -> str:
    """What the log says of the objective at the start of a run."""
    return "no masked pass"

  def draw(
    self, key: Array, batch: Batch, loss_history: LossHistory | None = None
  ) -> Draws:
    """Draws times, noise, dropped conditions and masks for a batch.

    Args:
      key: random key of the step.
      batch: what `draw_images` takes, and what the model's condition is made of:
        "label" (B,) int32.
      loss_history: state of the timestep sampler.
    """
    condition = self.model.conditioning
    y = condition.of_batch(batch)
    t_key, noise_key, label_key, mask_key, latent_key = jax.random.split(key, 5)
    x0 = draw_images(latent_key, batch)
    t, weights = self.timestep_sampler.sample(t_key, len(x0), loss_history)
    return Draws(
      x0=x0,
      t=t,
      weights=weights,
      noise=jax.random.normal(noise_key, (len(x0), self.num_passes, *x0.shape[1:])),
      y=condition.drop(label_key, y, self.num_passes),
      mask_noise=jax.random.uniform(mask_key, (len(x0), self.model.num_tokens)),
    )

  @abc.abstractmethod
  def loss(
    self, apply: Apply, params: Params, draws: Draws, static: Hashable
  ) -> tuple[Float[Array, ""], Losses]:
    """The loss of a batch, weighted by `draws.weights`, and its parts.

    Args:
      apply: `model.apply`.
      params: parameters of the network.
      draws: of `draw`.
      static: one of `static_choices`.

    Returns:
      (loss (), losses): losses (B,) of each sample by name, without the weights. They
      hold "total", of all passes, which the timestep sampler learns from; the others
      are logged.
    """

  def pass_losses(
    self, apply: Apply, params: Params, draws: Draws, index: int, *masks: Any
  ) -> Losses:
    """Losses (B,) by name of one pass of the network.

    Args:
      apply, params, draws: as of `loss`.
      index: of the pass: which noise and conditions of `draws` the pass takes.
      *masks: further arguments of the network, such as a `TokenMask`.
    """
    noise = draws.noise[:, index]
    x_t = self.process.q_sample(draws.x0, draws.t, noise)
    output = apply(
      {"params": params},
      x_t,
      self.process.network_time(draws.t),
      draws.y[:, index],
      *masks,
    )
    return self.process.training_losses(output, draws.x0, x_t, draws.t, noise)


def draw_images(key: Array, batch: Batch) -> Float[Array, "B H W C"]:
  """x0: "image", or a draw from the posterior of latents.

  Args:
    key: random key of the draw.
    batch: "image" (B, H, W, C) float32, or "moments" (B, 2, H, W, C), mean and std of
      each latent, of any float type.
  """
  if "image" in batch:
    return batch["image"]
  mean, std = jnp.unstack(batch["moments"].astype(jnp.float32), axis=1)
  return mean + std * jax.random.normal(key, mean.shape)


# Name -> the objective's class. An objective registers itself here.
OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def create_objective(
  name: str,
  *,
  model: Model,
  process: Process,
  timestep_sampler: TimestepSampler | None = None,
  **settings: Any,
) -> Objective:
  """Builds an objective by name.

  Args:
    name: "plain" or "mdt", or one that was added to OBJECTIVES.
    model, process, timestep_sampler: see `Objective`.
    **settings: of the objective; "mdt" takes ratio, width, num_lengths and multiple.

  Raises:
    SettingError: an unknown name or setting, or a value that cannot be used.
  """
  check_choice("objective", name, OBJECTIVES)
  given = {"model": model, "process": process, "timestep_sampler": timestep_sampler}
  check_arguments(OBJECTIVES[name], given | settings, f"the objective {name!r}")
  return OBJECTIVES[name](**given, **settings)


def objective_of_class(
  function: Callable[..., Objective],
  model: Model,
  process: Process,
  timestep_sampler: TimestepSampler,
) -> Objective:
  """The objective that a class, or a function, of one's own makes.

  Raises:
    SettingError: it does not take (model, process, timestep_sampler), or makes no
      Objective.
  """
  name = getattr(function, "__name__", repr(function))
  try:
    inspect.signature(function).bind(model, process, timestep_sampler)
  except TypeError as error:
    accepted = f"must be called with (model, process, timestep_sampler): {error}"
    raise SettingError("objective", name, accepted) from None
  made = function(model, process, timestep_sampler)
  if not isinstance(made, Objective):
    raise SettingError("objective", name, "must make a mdt_jax.objectives.Objective")
  return made
