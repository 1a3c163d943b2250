"""The compiled function that samples latents for labels, inpaints and edits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped, UInt32

from mdt_jax.diffusion.guidance import Guidance, ModelFn, noise_above
from mdt_jax.diffusion.loops import Hold, check_holds, step_noise
from mdt_jax.diffusion.predictions import sample_with_predictions
from mdt_jax.diffusion.samplers import OnStep, Sampler, sample
from mdt_jax.errors import SettingError
from mdt_jax.models.masking import TokenMask, token_mask_from_noise
from mdt_jax.models.registry import Model
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sampling.token_guidance import (
  Pair,
  check_tokens,
  draw_mask_noise,
  make_model_fn,
  needs_passes,
)
from mdt_jax.types import Array, Params

Given: TypeAlias = dict[str, Array]  # arrays of an image to inpaint or edit
# (params, labels (B, …), ids (B,), seed, [given]) -> latents (B, H, W, C) float32, or
# with kept calls (B, calls + 1, H, W, C). params is a `Pair` if the weak pass of
# guidance has a network of its own.
Generator: TypeAlias = jax.stages.Wrapped

# Folded into the key of an image, for the noise of the visible part in inpainting. With
# JAX's generator this gives the key of the steps again. That does no harm: the visible
# pixels read other numbers of the noise than the hidden ones.
HOLD_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Task:
  """The kind of sampling; each task compiles its own program.

  Attributes:
    kind: "draw": sample from noise alone. "inpaint": paint the hidden part of an image.
      "edit": add noise to an image up to an intermediate step and sample from there
      (SDEdit, arXiv 2108.01073).
    interpolation: for "inpaint": share of the process, in [0, 1] from full noise, in
      which the side-interpolater predicts the hidden tokens from the visible tokens.
    repeats: for "inpaint": how many times each step is repeated (RePaint, arXiv
      2201.09865); see `samplers.sample`.
    num_keep: for "inpaint": number of tokens with a visible part.
    strength: for "edit": noise level of the start, as a share of the process in (0, 1].
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
  """(H, W, C) of the network's samples, or of decoded images with an autoencoder."""
  if autoencoder is None:
    return model.input_shape
  height, width, _ = model.input_shape
  factor = autoencoder.model.downsampling
  return height * factor, width * factor, 3


def make_generator(
  model: Model,
  sampler: Sampler,
  task: Task = DRAW,
  platform: str | None = None,
  on_step: OnStep | None = None,
  weak_model: Model | None = None,
  kept_calls: Sequence[int] = (),
) -> Generator:
  """Builds the jitted function that samples latents for labels.

  Args:
    model: the network.
    sampler: respaced process, sampling method and guidance.
    task: draw, inpaint or edit.
    platform: "cpu", "gpu" or "tpu", where the program will run; None for the default
      backend of JAX.
    on_step: called on the host at each call of the network; see `samplers.sample`.
    weak_model: network of the weak pass of guidance; None for `model`.
    kept_calls: numbers of the network calls, from 0, whose predicted x0 is returned
      too; only for samplers with separate calls, to draw, without `on_step`.

  Returns:
    (params, labels (B, …), ids (B,), seed (), [given]) -> latents (B, H, W, C)
    float32, or with `kept_calls` the predictions and then the latents,
    (B, len(kept_calls) + 1, H, W, C). The labels are integer classes, or other
    conditions of the network. All noise of an image derives from the seed and the
    image's number in `ids`, so an image does not depend on the rest of the batch.
    `given` holds "image" (B, H, W, C) float32 for "inpaint" and "edit", and "hidden"
    (H, W) and "hidden_tokens" (L,) bool for "inpaint"; and "null" (B, …) if another
    condition replaces the null condition in guidance; see `Request`.

  Raises:
    SettingError: the process cannot edit, the sampling method cannot inpaint, or the
      networks cannot run the passes of guidance.
  """
  platform = platform or jax.default_backend()
  process = sampler.process
  shape = output_shape(model)
  edit_steps = process.num_edit_steps(task.strength) if task.kind == "edit" else None
  if task.kind == "inpaint":
    check_holds(sampler.method)
  check_tokens(model, sampler.guidance, weak_model)
  has_passes = needs_passes(sampler.guidance, weak_model)
  if has_passes and task.interpolation:
    accepted = "must be 0 if guidance leaves out tokens or has a weak network"
    raise SettingError("interpolation", task.interpolation, accepted)

  def guided_fn(
    params: Params, labels: Array, null: Array, mask: TokenMask | None
  ) -> ModelFn:
    """The network with guidance; `mask` hides the same tokens of every sample."""

    def network(x: Array, t: Array, y: Array) -> Array:
      rows = None
      if mask is not None:
        rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), a.shape[1])), mask)
      return cast("Array", model.apply({"params": params}, x, t, y, rows))

    return sampler.guidance.apply(
      network,
      labels,
      null,
      one_batch=platform != "cpu" or model.unroll == 1,
    )

  @jax.jit
  def generate(
    params: Params | Pair,
    labels: Shaped[Array, "B ..."],
    ids: UInt32[Array, "B"],
    seed: UInt32[Array, ""],
    given: Given | None = None,
  ) -> Float[Array, "B *calls H W C"]:
    given = given or {}
    drawn = draw_noise(shape, ids, seed)
    start, hold = make_start(sampler, task, drawn, given)
    null = weak_condition(model, sampler.guidance, labels, given)
    if has_passes:
      noise_of = draw_mask_noise(drawn.keys, model.num_tokens)
      model_fn = make_model_fn(
        model, params, labels, null, sampler, noise_of, weak_model
      )
    else:
      assert not isinstance(params, Pair)
      model_fn = guided_fn(params, labels, null, None)
    if task.interpolation and not isinstance(params, Pair):
      mask = token_mask_from_noise(given["hidden_tokens"][None], task.num_keep)
      masked_fn = guided_fn(params, labels, null, mask)
      model_fn = _switch(masked_fn, model_fn, sampler.guidance, task.interpolation)

    if kept_calls:
      return sample_with_predictions(
        model_fn,
        process,
        start,
        drawn.step_keys,
        kept_calls,
        method=sampler.method,
        eta=sampler.eta,
        clip_denoised=sampler.clip_denoised,
      )
    x_0 = sample(
      model_fn,
      process,
      start,
      drawn.step_keys,
      method=sampler.method,
      eta=sampler.eta,
      clip_denoised=sampler.clip_denoised,
      num_steps=edit_steps,
      hold=hold,
      repeats=task.repeats,
      on_step=on_step,
      arguments=sampler.arguments,
    )
    return keep_visible(task, x_0, given)

  return generate


def weak_condition(
  model: Model, guidance: Guidance, labels: Array, given: Given
) -> Array:
  """Returns the conditions (B, …) of the weak pass of guidance.

  Args:
    model, guidance: the network and its guidance.
    labels: (B, …) conditions to sample.
    given: see `make_generator`; "null" replaces the null condition.
  """
  if not guidance.needs_null:
    return labels
  return given["null"] if "null" in given else model.conditioning.null_like(labels)


class Drawn(NamedTuple):
  """The random keys and the first noise of images.

  Attributes:
    keys: (B,) random keys of the images.
    hold_keys: (B,) keys of the noise of the visible part, for inpainting.
    step_keys: (B,) keys of the noise added at the steps.
    noise: (B, H, W, C) standard normal noise.
  """

  keys: Array
  hold_keys: Array
  step_keys: Array
  noise: Array


def draw_noise(shape: tuple[int, int, int], ids: Array, seed: Array) -> Drawn:
  """Draws the noise that sampling starts from.

  Args:
    shape: (H, W, C) of a latent.
    ids: (B,) numbers of the images.
    seed: () seed.
  """
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
  hold_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, HOLD_STREAM)
  start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  noise = jax.vmap(lambda key: jax.random.normal(key, shape))(start_keys)
  return Drawn(keys, hold_keys, step_keys, noise)


def make_start(
  sampler: Sampler,
  task: Task,
  drawn: Drawn,
  given: Given,
  hold_noise: Array | None = None,
) -> tuple[Array, Hold | None]:
  """Returns the latents that sampling starts from, and what holds the visible part.

  Args:
    sampler, task, given: see `make_generator`.
    drawn: from `draw_noise`.
    hold_noise: (B, H, W, C) noise of the visible part at a step of a random sampler;
      None to draw the noise of each step.

  Returns:
    The latents (B, H, W, C), and `hold` of `samplers.sample`; None without inpainting.
  """
  process, noise = sampler.process, drawn.noise
  start = noise if process.noise_scale == 1 else process.noise_scale * noise
  if task.kind == "edit":
    t = jnp.full((len(noise),), process.num_edit_steps(task.strength) - 1)
    start = process.q_sample(given["image"], t, noise)

  def hold_visible(x: Array, step: Array) -> Array:
    t = jnp.full((len(x),), step)
    # A deterministic sampler keeps one noise; a random sampler draws noise each step.
    added = noise
    if sampler.is_random:
      added = hold_noise
      if added is None:
        added = step_noise(drawn.hold_keys, step, x.shape)
    visible = process.q_sample(given["image"], t, added)
    return jnp.where(given["hidden"][..., None], x, visible)

  return start, hold_visible if task.kind == "inpaint" else None


def keep_visible(task: Task, x_0: Array, given: Given) -> Array:
  """Overwrites the visible part of inpainted latents (B, H, W, C) by the image."""
  if task.kind != "inpaint":
    return x_0
  return jnp.where(given["hidden"][..., None], x_0, given["image"])


def _switch(first: ModelFn, then: ModelFn, guidance: Guidance, share: float) -> ModelFn:
  """A model function that calls `first` in the noisy `share` of the process."""
  if share == 1:
    return first

  def switched(x: Array, t: Array) -> Array:
    above = noise_above(t[0], 1 - share, guidance.num_timesteps, guidance.clean_time)
    return jax.lax.cond(above >= 0, first, then, x, t)

  return switched
