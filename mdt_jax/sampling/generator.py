"""From labels to latents: the noise of each image, and guided sampling from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped, UInt32

from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.diffusion.process import Process
from mdt_jax.diffusion.samplers import Sampler, sample, step_noise
from mdt_jax.errors import SettingError
from mdt_jax.models.masking import TokenMask, token_mask_from_noise
from mdt_jax.models.registry import Model
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.types import Array, Params

Given: TypeAlias = dict[str, Array]  # what an image is painted or edited from
# (params, labels (B, …), ids (B,), seed, [given]) -> latents (B, H, W, C) float32
Generator: TypeAlias = jax.stages.Wrapped

HOLD_STREAM = 1  # folded into an image's key: the noise on its visible part


@dataclasses.dataclass(frozen=True)
class Task:
  """What a generator does with a given image; each task compiles its own program.

  Attributes:
    kind: "draw": sample from noise alone. "inpaint": paint the hidden part. "edit":
      noise the image up to an intermediate step and sample from there (SDEdit,
      arXiv 2108.01073).
    interpolation: of "inpaint": the share of the process, counted from full noise, in
      which the side-interpolater predicts the hidden tokens from the visible ones.
    repeats: of "inpaint": how often each step is taken; see `samplers.sample`.
    num_keep: of "inpaint": the number of tokens with a visible part.
    strength: of "edit": the noise level of the start, as a share of the process.
  """

  kind: str = "draw"
  interpolation: float = 0.0
  repeats: int = 1
  num_keep: int = 0
  strength: float = 1.0


DRAW = Task()


def output_shape(
  model: Model, autoencoder: Autoencoder | None = None
) -> tuple[int, int, int]:
  """(H, W, C) of the network's samples, or of the images decoded from them."""
  size, channels = model.input_size, model.in_channels
  if autoencoder is not None:
    size, channels = size * autoencoder.model.downsampling, 3
  return size, size, channels


def make_generator(
  model: Model, sampler: Sampler, task: Task = DRAW, platform: str | None = None
) -> Generator:
  """The jitted function from labels to latents.

  Args:
    model: the network.
    sampler: respaced process, method and guidance.
    task: what the generator does with a given image.
    platform: "cpu", "gpu" or "tpu", where the program will run; None for the default
      backend of JAX.

  Returns:
    (params, labels (B, …), ids (B,), seed (), [given]) -> latents (B, H, W, C)
    float32. The labels are integers, or what the model's condition is otherwise. All
    noise of an image derives from (seed, its id), so the image does not depend on
    the rest of the batch. `given` holds "image" (B, H, W, C) float32 for "inpaint" and
    "edit", and "hidden" (H, W) and "hidden_tokens" (L,) bool for "inpaint".

  Raises:
    SettingError: the task needs the timesteps of a process that has none.
  """
  platform = platform or jax.default_backend()
  process = sampler.process
  shape = output_shape(model)
  edit_steps = num_edit_steps(process, task.strength) if task.kind == "edit" else None
  masked_from = 0.0
  if task.interpolation:
    masked_from = (1 - task.interpolation) * _gaussian(process).num_original_timesteps

  def guided_fn(params: Params, labels: Array, mask: TokenMask | None) -> ModelFn:
    """The guided network, which sees all tokens or those of a mask of one sample."""

    def network(x: Array, t: Array, y: Array) -> Array:
      rows = None
      if mask is not None:
        rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), a.shape[1])), mask)
      return cast("Array", model.apply({"params": params}, x, t, y, rows))

    is_guided = sampler.guidance.scale != 1
    return sampler.guidance.apply(
      network,
      labels,
      model.conditioning.null_like(labels) if is_guided else labels,
      one_batch=platform != "cpu" or model.unroll == 1,
    )

  @jax.jit
  def generate(
    params: Params,
    labels: Shaped[Array, "B ..."],
    ids: UInt32[Array, "B"],
    seed: UInt32[Array, ""],
    given: Given | None = None,
  ) -> Float[Array, "B H W C"]:
    given = given or {}
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    hold_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, HOLD_STREAM)
    start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(start_keys)

    start = noise
    if edit_steps is not None:
      t = jnp.full((len(noise),), edit_steps - 1)
      start = process.q_sample(given["image"], t, noise)

    def hold_visible(x: Array, step: Array) -> Array:
      t = jnp.full((len(x),), step)
      # A deterministic path keeps one noise; a random path draws noise at each step.
      drawn = step_noise(hold_keys, step, x.shape) if sampler.is_random else noise
      visible = process.q_sample(given["image"], t, drawn)
      return jnp.where(given["hidden"][..., None], x, visible)

    model_fn = guided_fn(params, labels, None)
    if task.interpolation:
      mask = token_mask_from_noise(given["hidden_tokens"][None], task.num_keep)
      masked_fn = guided_fn(params, labels, mask)
      model_fn = _switch(masked_fn, model_fn, masked_from)

    x_0 = sample(
      model_fn,
      process,
      start,
      step_keys,
      method=sampler.method,
      eta=sampler.eta,
      clip_denoised=sampler.clip_denoised,
      num_steps=edit_steps,
      hold=hold_visible if task.kind == "inpaint" else None,
      repeats=task.repeats,
    )
    if task.kind == "inpaint":
      return jnp.where(given["hidden"][..., None], x_0, given["image"])
    return x_0

  return generate


def num_edit_steps(process: Process, strength: float) -> int:
  """Steps of a respaced process whose timesteps lie within `strength` of it."""
  gaussian = _gaussian(process)
  limit = strength * (gaussian.num_original_timesteps - 1)
  return int(np.count_nonzero(gaussian.timesteps <= limit))


def _gaussian(process: Process) -> GaussianDiffusion:
  """The process, whose original timesteps a share of the process is counted in."""
  if not isinstance(process, GaussianDiffusion):
    raise SettingError(
      "process",
      type(process).__name__,
      "takes no interpolation and no edit, which need a GaussianDiffusion",
    )
  return process


def _switch(
  first: Callable[[Array, Array], Array], then: ModelFn, limit: float
) -> ModelFn:
  """`first` at timesteps from `limit` up, where sampling begins, then `then`."""
  if limit == 0:
    return first
  return lambda x, t: jax.lax.cond(t[0] >= limit, first, then, x, t)
