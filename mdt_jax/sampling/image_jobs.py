"""Sampling jobs that start from an image: inpainting and editing."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from mdt_jax.data.transforms import to_float
from mdt_jax.diffusion.loops import check_holds
from mdt_jax.errors import SettingError
from mdt_jax.sampling import inpainting
from mdt_jax.sampling.generator import Task
from mdt_jax.sampling.inpainting import ImageLike
from mdt_jax.sampling.job import SamplingJob
from mdt_jax.sampling.token_guidance import needs_passes

DEFAULT_INTERPOLATION = 0.25  # share of the process, see `Task.interpolation`
DEFAULT_STRENGTH = 0.6  # share of the process, see `Task.strength`


def with_inpainting(
  job: SamplingJob,
  image: ImageLike,
  mask: ImageLike | None,
  interpolation: float | None,
  repeats: int | None,
) -> SamplingJob:
  """Turns a job that draws images into a job that inpaints an image.

  Args:
    job: job of kind "draw".
    image, mask, interpolation, repeats: see `Pipeline.job`.

  Raises:
    SettingError: the image or the mask does not fit the model, or a value is out of
      range.
  """
  model, method = job.experiment.model, job.experiment.sampler.method
  check_holds(method)
  pixels = _read_images(job, "inpaint", image)
  hidden_pixels = inpainting.read_mask("mask", mask, job.image_shape[:2])
  hidden = hidden_pixels
  if job.autoencoder is not None:
    factor = job.autoencoder.model.downsampling
    hidden = inpainting.downsample_mask("mask", hidden_pixels, factor)
  tokens = inpainting.hidden_tokens(hidden, model.patch_size)
  weak_model = None if job.weak is None else job.weak.model
  has_passes = needs_passes(job.experiment.sampler.guidance, weak_model)
  if interpolation is None:
    interpolates = model.takes_mask and not has_passes
    interpolation = DEFAULT_INTERPOLATION if interpolates else 0.0
  repeats = 1 if repeats is None else repeats
  if repeats < 1 or (repeats > 1 and method not in ("ddpm", "ddim")):
    raise SettingError(
      "repeats", repeats, "must be at least 1, and 1 unless method is ddpm or ddim"
    )
  if not 0 <= interpolation <= 1:
    raise SettingError("interpolation", interpolation, "must lie in [0, 1]")
  if interpolation and not model.takes_mask:
    raise SettingError(
      "interpolation",
      interpolation,
      "must be 0: this network has no side-interpolater",
    )
  if interpolation and has_passes:
    accepted = "must be 0 if guidance leaves out tokens or has a weak network"
    raise SettingError("interpolation", interpolation, accepted)
  task = Task(
    "inpaint",
    # Without a hidden token there is nothing to interpolate.
    interpolation=interpolation if tokens.any() else 0.0,
    repeats=repeats,
    num_keep=int(np.count_nonzero(~tokens)),
  )
  request = dataclasses.replace(
    job.request, image=_encode(job, pixels), hidden=hidden, hidden_tokens=tokens
  )
  return dataclasses.replace(
    job, task=task, request=request, pixels=pixels, hidden=hidden_pixels
  )


def with_editing(
  job: SamplingJob, image: ImageLike, strength: float | None
) -> SamplingJob:
  """Turns a job that draws images into a job that edits an image.

  Args:
    job: job of kind "draw".
    image, strength: see `Pipeline.job`.

  Raises:
    SettingError: the image does not fit the model, or `strength` is out of range.
  """
  strength = DEFAULT_STRENGTH if strength is None else strength
  if not 0 < strength <= 1:
    raise SettingError("strength", strength, "must lie in (0, 1]")
  pixels = _read_images(job, "edit", image)
  request = dataclasses.replace(job.request, image=_encode(job, pixels))
  task = Task("edit", strength=strength)
  return dataclasses.replace(job, task=task, request=request, pixels=pixels)


def _read_images(
  job: SamplingJob, setting: str, image: ImageLike
) -> UInt8[np.ndarray, "*N H W C"]:
  """Reads the pixels of one image, or of one image for each label."""
  if not job.draws_pixels:
    raise SettingError("vae", None, "must be given: this model works on latents")
  height, width, channels = job.image_shape
  count = len(job.request.labels)
  return inpainting.read_images(setting, image, count, (height, width), channels)


def _encode(
  job: SamplingJob, pixels: UInt8[np.ndarray, "*N H W C"]
) -> Float[np.ndarray, "*N h w c"]:
  """The network's input for images: pixels in [-1, 1], or mean latents."""
  if job.autoencoder is None:
    return to_float(pixels)
  rows: Shaped[np.ndarray, "N 1 H W C"] = pixels.reshape(-1, 1, *job.image_shape)
  latents = np.concatenate([job.autoencoder.moments(row)[:, 0] for row in rows])
  return latents if pixels.ndim == 4 else latents[0]
