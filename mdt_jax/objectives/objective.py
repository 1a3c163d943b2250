"""The interface of an objective: the random draws and the loss of a training step.

The training step works with any objective. It derives a key from (seed, step), calls
`draw` for the whole batch and differentiates `loss`. Gradient accumulation, parameter
averages and skipped steps do not depend on the objective.
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
# Name -> loss of each sample (B,). "total", the loss of all passes, is required.
Losses = dict[str, Array]


class Draws(flax.struct.PyTreeNode):
  """A batch of samples with all random numbers that the loss needs.

  Attributes:
    x0: (B, H, W, C) float32 latents.
    t: (B,) times of the process, the same in all passes.
    weights: (B,) float32 loss weights of the timestep sampler.
    noise: (B, passes, H, W, C) standard normal.
    y: (B, passes, ...) conditions; some are replaced by the null condition.
    mask_noise: (B, L) uniform in [0, 1); tokens with the largest noise are masked.
    path_drop: (B,) bool, samples without a deep path; None but for SPRINT.
  """

  x0: Array
  t: Array
  weights: Array
  noise: Array
  y: Array
  mask_noise: Array
  path_drop: Array | None = None


class Objective(abc.ABC):
  """Interface: draws the random numbers of a training step and computes its loss.

  Args:
    model: the network; provides the condition and the number of tokens. `loss` applies
      the network by its argument `apply`.
    process: the diffusion process.
    timestep_sampler: draws the times t; None for the uniform sampler.
  """

  # Number of passes for which `draw` draws noise and conditions. It is also 2 for
  # objectives with one pass, so that runs with and without a masked pass draw the same
  # random numbers in the first pass.
  num_passes: ClassVar[int] = 2
  # Number of equal parts that `loss` divides the images of each device into.
  groups: int = 1

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
    """Accepted values of the argument `static` of `loss`, by increasing memory use.

    XLA compiles the training step once per value.
    """
    return (None,)

  def choose_static(self, seed: int, step: int) -> Hashable:
    """Returns one of `static_choices`; must depend only on (seed, step)."""
    del seed, step
    return self.static_choices[0]

  @property
  def largest_static(self) -> Hashable:
    """The value of `static_choices` that uses the most memory."""
    return self.static_choices[-1]

  def is_unmasked(self, static: Hashable) -> bool:
    """Whether `loss` with this value of `static` equals `unmasked_loss`."""
    del static
    return False

  def flops(self, static: Hashable) -> float:
    """Counts the operations of a training step on one image; see `models.flops`."""
    del static
    return train_flops(self.model)

  @property
  def summary(self) -> str:
    """Description of the objective for the log at the start of a run."""
    return "no masked pass"

  def draw(
    self, key: Array, batch: Batch, loss_history: LossHistory | None = None
  ) -> Draws:
    """Draws latents, times, noise, dropped conditions and mask noise for a batch.

    Args:
      key: random key of the step.
      batch: name -> array: the entries that `draw_images` reads, and those that the
        network's condition reads, such as "label" (B,) int32.
      loss_history: state of the timestep sampler; None for the uniform sampler.

    Raises:
      ValueError: the batch holds a condition that cannot be embedded.
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
    """Computes the loss of a batch.

    Args:
      apply: the network, `model.apply`.
      params: parameters of the network.
      draws: output of `draw`, or a part of it along B.
      static: one of `static_choices`.

    Returns:
      (loss, losses). loss is a scalar, the mean weighted by `draws.weights`. losses
      maps names to unweighted losses (B,) of each sample. losses["total"], the sum over
      all passes, updates the timestep sampler; the others are logged.
    """

  def unmasked_loss(
    self, apply: Apply, params: Params, draws: Draws
  ) -> tuple[Float[Array, ""], Losses]:
    """Computes the loss of a batch without removing tokens.

    The last steps of a run with `config.objective.unmasked_from` use this loss. By
    default it is that of one unmasked pass. For arguments and result see `loss`.
    """
    losses = self.pass_losses(apply, params, draws, 0)
    total = losses["loss"]
    return (total * draws.weights).mean(), {**losses, "total": total}

  def pass_losses(
    self,
    apply: Apply,
    params: Params,
    draws: Draws,
    index: int,
    *masks: Any,
    mean: Callable[[Array], Array] | None = None,
    **options: Any,
  ) -> Losses:
    """Computes the losses of one pass of the network.

    Args:
      apply, params, draws, index, *masks, **options: see `run_pass`.
      mean: see `Process.training_losses`; None for the mean over all numbers.

    Returns:
      name -> (B,) loss; see `Process.training_losses`.
    """
    x_t, output = self.run_pass(apply, params, draws, index, *masks, **options)
    return self.losses_of_output(output, x_t, draws, index, mean)

  def run_pass(
    self,
    apply: Apply,
    params: Params,
    draws: Draws,
    index: int,
    *masks: Any,
    **options: Any,
  ) -> tuple[Array, Array]:
    """Runs one pass of the network.

    Args:
      apply, params, draws: see `loss`.
      index: index of the pass, which selects noise and conditions of `draws`.
      *masks: further arguments of the network, such as a `TokenMask`.
      **options: further arguments of the network by name.

    Returns:
      (x_t (B, H, W, C), the output of the network).
    """
    x_t = self.process.q_sample(draws.x0, draws.t, draws.noise[:, index])
    output = apply(
      {"params": params},
      x_t,
      self.process.network_time(draws.t),
      draws.y[:, index],
      *masks,
      **options,
    )
    return x_t, output

  def losses_of_output(
    self,
    output: Array,
    x_t: Array,
    draws: Draws,
    index: int,
    mean: Callable[[Array], Array] | None = None,
  ) -> Losses:
    """Computes the losses of an output that `run_pass` returned; see `pass_losses`."""
    # A process of the user's own may not have the argument `mean`.
    averaged = {} if mean is None else {"mean": mean}
    return self.process.training_losses(
      output, draws.x0, x_t, draws.t, draws.noise[:, index], **averaged
    )


def draw_images(key: Array, batch: Batch) -> Float[Array, "B H W C"]:
  """Returns x0 of a batch: its images, or a draw from the posterior of its latents.

  Args:
    key: random key.
    batch: holds "image" (B, H, W, C) float32, returned unchanged; or "moments"
      (B, 2, H, W, C) of any float dtype, mean and standard deviation of the latents.
  """
  if "image" in batch:
    return batch["image"]
  mean, std = jnp.unstack(batch["moments"].astype(jnp.float32), axis=1)
  return mean + std * jax.random.normal(key, mean.shape)


# Name -> class of the objective. Each objective registers itself here.
OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def create_objective(
  name: str,
  *,
  model: Model,
  process: Process,
  timestep_sampler: TimestepSampler | None = None,
  num_steps: int | None = None,
  **settings: Any,
) -> Objective:
  """Builds an objective by name.

  Args:
    name: a key of OBJECTIVES, such as "plain", "mdt" or "tread".
    model, process, timestep_sampler: see `Objective`.
    num_steps: steps of the run, for objectives that change over a run.
    **settings: further arguments of the objective's class; for "mdt": ratio, width,
      num_lengths, multiple and groups; for "tread" and the other methods of one pass,
      see `objectives.tokens.TokenObjective`.

  Raises:
    SettingError: a name or a setting is unknown, or a value is invalid.
  """
  check_choice("objective", name, OBJECTIVES)
  of_run: dict[str, Any] = {
    "model": model,
    "process": process,
    "timestep_sampler": timestep_sampler,
  }
  if "num_steps" in inspect.signature(OBJECTIVES[name]).parameters:
    of_run["num_steps"] = num_steps
  what = f"the objective {name!r}"
  check_arguments(OBJECTIVES[name], settings, what, added=of_run)
  return OBJECTIVES[name](**of_run, **settings)


def objective_of_class(
  function: Callable[..., Objective],
  model: Model,
  process: Process,
  timestep_sampler: TimestepSampler,
) -> Objective:
  """Builds an objective from a user's class or function.

  Args:
    function: called with (model, process, timestep_sampler); returns an `Objective`.
    model, process, timestep_sampler: see `Objective`.

  Raises:
    SettingError: `function` does not accept these arguments, or returns no Objective.
  """
  name = getattr(function, "__name__", repr(function))
  try:
    inspect.signature(function).bind(model, process, timestep_sampler)
  except TypeError as error:
    accepted = f"must accept (model, process, timestep_sampler): {error}"
    raise SettingError("objective", name, accepted) from None
  made = function(model, process, timestep_sampler)
  if not isinstance(made, Objective):
    raise SettingError("objective", name, "must return a mdt_jax.objectives.Objective")
  return made
