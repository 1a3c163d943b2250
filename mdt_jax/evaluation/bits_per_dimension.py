"""Bits per dimension of a data set under a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, Int, UInt32

from mdt_jax import sharding
from mdt_jax.checkpoints.loading import Checkpoint
from mdt_jax.data.sources import Source
from mdt_jax.data.transforms import pixels_to_float, without_draws
from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn
from mdt_jax.diffusion.likelihood import calc_bpd, calc_flow_bpd
from mdt_jax.diffusion.process import Process
from mdt_jax.errors import SettingError, check_range
from mdt_jax.models.registry import Model
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.setting_limits import MAX_STEPS
from mdt_jax.types import Array, Batch, Params

NUM_IMAGES = 1000  # default number of images of `measure`
FLOW_STEPS = 100  # default number of steps of a probability flow
GAP_STREAM = 2**31  # folded into the key of an image, for the noise between levels

# (params, batch, ids (B,), seed) -> terms of `calc_bpd`
Bound: TypeAlias = Callable[[Params, Batch, Array, Array], dict[str, Array]]


def make_bound(
  model: Model,
  process: Process,
  num_steps: int | None = None,
  *,
  clip_denoised: bool,
  autoencoder: Autoencoder | None = None,
) -> Bound:
  """Builds the jitted likelihood of images, in bits per dimension.

  This is the variational bound of a Gaussian process, and the density under the
  probability flow of a process in continuous time. The latter adds uniform noise to
  pixels, to fill the gaps between their 256 levels.

  Args:
    model: the network.
    process: the process that the network was trained on.
    num_steps: number of steps of a respaced process; None for all steps, like the
      released code, or for `FLOW_STEPS` in continuous time.
    clip_denoised: whether the data are pixels in [-1, 1]; the bound then clips each
      predicted x0.
    autoencoder: encodes the images of a batch; None if a batch holds the latents or the
      pixels that the network was trained on.

  Returns:
    (params, batch, ids (B,), seed) -> terms of `calc_bpd` or of `calc_flow_bpd`. The
    noise of an image derives from the seed and the image's number in `ids`, and does
    not depend on the rest of the batch. Latents are the means of the encoder, without
    noise.

  Raises:
    SettingError: the process has no likelihood, or `num_steps` is out of range.
  """
  likelihood = _likelihood(process, num_steps, clip_denoised)

  @jax.jit
  def bound(
    params: Params, batch: Batch, ids: UInt32[Array, " B"], seed: UInt32[Array, ""]
  ) -> dict[str, Array]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    y = model.conditioning.of_batch(batch)

    def model_fn(x: Array, t: Array) -> Array:
      output = model.apply({"params": params}, x, t, y)
      assert isinstance(output, Array)
      return output

    x0 = batch["moments"][:, 0] if "moments" in batch else batch["image"]
    return likelihood(model_fn, x0, keys)

  if autoencoder is None:
    return bound

  def bound_of_images(
    params: Params, batch: Batch, ids: Array, seed: Array
  ) -> dict[str, Array]:
    encoded = dict(batch)
    encoded["moments"] = autoencoder.moments(encoded.pop("image"))
    return bound(params, encoded, ids, seed)

  return bound_of_images


def _likelihood(
  process: Process, num_steps: int | None, is_pixels: bool
) -> Callable[[ModelFn, Array, Array], dict[str, Array]]:
  """Returns the function (network, x0 (B, H, W, C), keys (B,)) -> terms."""
  if isinstance(process, ContinuousProcess):
    steps = FLOW_STEPS if num_steps is None else num_steps
    check_range("num_steps", steps, 1, MAX_STEPS)

    def density(model_fn: ModelFn, x0: Array, keys: Array) -> dict[str, Array]:
      if is_pixels:
        step = jnp.uint32(GAP_STREAM)
        gaps = jax.vmap(
          lambda key: jax.random.uniform(
            jax.random.fold_in(key, step), x0.shape[1:], minval=-1.0, maxval=1.0
          )
        )(keys)
        x0 += gaps / 255  # half of the distance between two levels
      terms = calc_flow_bpd(model_fn, process, x0, keys, num_steps=steps)
      del terms["noise"]
      if is_pixels:
        terms["total_bpd"] -= np.log2(2 / 255)
      return terms

    return density
  if not isinstance(process, GaussianDiffusion):
    raise SettingError(
      "metrics",
      "bpd",
      f"needs the process gaussian, flow or edm, not a {type(process).__name__}",
    )
  total = process.num_timesteps
  if num_steps is not None and not 1 <= num_steps <= total:
    raise SettingError(
      "num_steps",
      num_steps,
      f"must lie in [1, config.diffusion.num_timesteps = {total}]",
    )
  diffusion = process if num_steps is None else process.respaced("", num_steps)
  return lambda model_fn, x0, keys: calc_bpd(
    model_fn, diffusion, x0, keys, clip_denoised=is_pixels
  )


def bounds(
  bound: Bound,
  params: Params,
  source: Source,
  indices: Int[np.ndarray, " N"],
  *,
  seed: int,
  batch_size: int,
) -> Iterator[dict[str, Float[np.ndarray, "B *steps"]]]:
  """Computes the bounds of images of a source, batch by batch.

  Args:
    bound: function from `make_bound`.
    params: parameters of the network.
    source: labelled images.
    indices: numbers of the images in the source.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
    batch_size: number of images in a batch.

  Yields:
    Terms of `calc_bpd` for each batch; the last batch may be shorter.
  """
  for start in range(0, len(indices), batch_size):
    count = min(batch_size, len(indices) - start)
    # The last batch is filled up, so that one compilation serves all batches.
    ids = indices[(start + np.arange(batch_size)) % len(indices)]
    examples = [without_draws(source[int(i)]) for i in ids]
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *examples)
    terms = bound(
      params,
      pixels_to_float(batch),
      jnp.asarray(ids, jnp.uint32),
      jnp.asarray(seed, jnp.uint32),
    )
    yield {name: np.asarray(term)[:count] for name, term in terms.items()}


def measure(
  checkpoint: Checkpoint,
  num_images: int = NUM_IMAGES,
  *,
  num_steps: int | None = None,
  batch_size: int = 64,
  seed: int = 0,
) -> dict[str, Any]:
  """Computes the mean likelihood over a run's data, with a progress bar.

  The images are spread evenly over the held-out data of the run
  (config.data.validation), or over the training data if the run holds out no data.

  Args:
    checkpoint: objects of the run, and averaged parameters.
    num_images: number of images, at most.
    num_steps: see `make_bound`.
    batch_size: number of images in a batch.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).

  Returns:
    "step" and "ema_decay" of the parameters, whether the images are "held_out", number
    of "images", and the mean of each term of `calc_bpd`.

  Raises:
    SettingError: the process has no likelihood, `num_steps` is out of range, or the
      data cannot be read.
  """
  experiment = checkpoint.experiment
  bound = make_bound(
    experiment.model,
    experiment.process,
    num_steps,
    clip_denoised=experiment.holds_pixels,
    autoencoder=experiment.autoencoder if experiment.encodes_images else None,
  )
  held_out = experiment.settings.data.validation > 0
  source = experiment.held_out if held_out else experiment.source
  count = min(num_images, len(source))
  batches = bounds(
    bound,
    jax.device_put(checkpoint.params, sharding.replicated(experiment.mesh)),
    source,
    np.linspace(0, len(source) - 1, count).astype(int),
    seed=seed,
    batch_size=min(batch_size, count),
  )
  found: list[dict[str, np.ndarray]] = []
  with tqdm.tqdm(total=count, unit="image") as bar:
    for terms in batches:
      found.append(terms)
      bar.update(len(terms["total_bpd"]))
  means = {
    name: np.concatenate([terms[name] for terms in found]).mean(axis=0).tolist()
    for name in found[0]
  }
  return {
    "step": checkpoint.step,
    "ema_decay": experiment.settings.sampled_decay,
    "held_out": held_out,
    "images": count,
    **means,
  }
