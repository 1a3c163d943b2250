"""A pretrained autoencoder in use: images to moments of latents, latents to images."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mdt_jax.models.autoencoder_kl import AutoencoderKL, decode_in_slices
from mdt_jax.pretrained.torch_vae import load_vae

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """A network with its parameters.

  Latents are as a diffusion sees them: shifted and scaled to about unit variance.
  """

  model: AutoencoderKL
  params: Params

  @classmethod
  def load(
    cls,
    name: str,
    dtype: Any = jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
  ) -> Autoencoder:
    """Loads a folder, or a model of the Hugging Face hub; see `torch_vae.load_vae`.

    Args:
      name: folder or hub id.
      dtype: compute type.
      sharding: where the parameters lie; None for the first device.
    """
    model, params = load_vae(name, dtype)
    return cls(model, jax.device_put(params, sharding))

  def latent_shape(self, image_size: int) -> tuple[int, int, int]:
    """(H, W, C) of the latents of square images."""
    side = image_size // self.model.downsampling
    return (side, side, self.model.latent_channels)

  def moments(self, images: Array | np.ndarray) -> Array:
    """Mean and deviation (B, 2, h, w, C) float32 of the latents of images.

    Args:
      images: (B, H, W, 3), uint8, or floats in [-1, 1].
    """
    return _moments(self.model, self.params, images)

  def decode(self, latents: Array | np.ndarray) -> Array:
    """Images (B, H, W, 3) float32, about in [-1, 1], of latents (B, h, w, C).

    Inside `sharding.use_mesh` its devices share them, where B is a multiple of
    the devices that share a batch. Of several processes all must take part.
    """
    (axes,) = nn.logical_to_mesh_axes(("batch",))
    return _decode(self.model, self.params, latents, axes)


@functools.partial(jax.jit, static_argnames=("model", "axes"))
def _decode(
  model: AutoencoderKL, params: Params, latents: Array, axes: tuple[str, ...] | None
) -> Array:
  """`axes`: of the mesh, that share the images; None for none."""

  def decode(params: Params, latents: Array) -> Array:
    return decode_in_slices(model, params, model.unscale(latents))

  mesh = jax.sharding.get_abstract_mesh()
  if not axes or len(latents) % math.prod(mesh.shape[axis] for axis in axes):
    return decode(params, latents)
  # By hand: to JAX the slices of a shared batch are one loop over all of it.
  whole, split = PartitionSpec(), PartitionSpec(axes)
  return jax.shard_map(
    decode, in_specs=(whole, split), out_specs=split, check_vma=False
  )(params, latents)


@functools.partial(jax.jit, static_argnums=0)
def _moments(model: AutoencoderKL, params: Params, images: Array) -> Array:
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 127.5 - 1
  mean, logvar = model.apply({"params": params}, images, method="encode")
  deviation = jnp.exp(0.5 * logvar) * model.scaling_factor
  return jnp.stack([model.scale(mean), deviation], axis=1)
