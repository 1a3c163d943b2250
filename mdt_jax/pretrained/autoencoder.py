"""A pretrained autoencoder: images to moments of latents, latents to images."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Shaped

from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.models.autoencoder_decoding import decode_in_slices
from mdt_jax.models.autoencoder_kl import AutoencoderKL
from mdt_jax.pretrained.torch_vae import load_vae
from mdt_jax.types import Array, Dtype, Params


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """An autoencoder network with its parameters.

  Its latents are those of the diffusion: shifted and scaled to about unit variance.
  """

  model: AutoencoderKL
  params: Params

  @classmethod
  def load(
    cls,
    name: str,
    dtype: Dtype = jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
  ) -> Autoencoder:
    """Loads a folder, or a model of the Hugging Face hub; see `torch_vae.load_vae`.

    Args:
      name: folder or hub id.
      dtype: type that the network computes in.
      sharding: of the parameters; None for the first device.
    """
    model, params = load_vae(name, dtype)
    return cls(model, jax.device_put(params, sharding))

  def check_scale(self, name: str | None, card: Mapping[str, Any]) -> None:
    """Raises SettingError where latents are stored at another scale than this one.

    Args:
      name: of this autoencoder, as the user gave it.
      card: of the latents, see `data.latents.read_card`.
    """
    for factor in ("scaling_factor", "shift_factor"):
      own, stored = getattr(self.model, factor), card[factor]
      if own != stored:
        raise SettingError(
          "config.data.vae",
          name,
          f"has {factor} = {own}, where the latents were made with {stored} "
          f"(by {card['vae']})",
        )

  def latent_shape(self, image_size: int) -> tuple[int, int, int]:
    """Returns (h, w, C) of the latents of square images."""
    side = image_size // self.model.downsampling
    return (side, side, self.model.latent_channels)

  def moments(
    self, images: Shaped[Array | np.ndarray, "B H W 3"]
  ) -> Float32[Array, "B 2 h w C"]:
    """Returns mean and std of the latents of images.

    Args:
      images: uint8, or floats in [-1, 1].
    """
    return _moments(self.model, self.params, images)

  def decode(
    self, latents: Float[Array | np.ndarray, "B h w C"]
  ) -> Float32[Array, "B H W 3"]:
    """Decodes latents to images, about in [-1, 1].

    Inside `sharding.use_mesh`, the devices of the mesh share the latents if B is a
    multiple of the number of devices that share a batch. With several processes, all
    of them must call this function.
    """
    axes = spmd.logical_to_mesh_axes(("batch",)) or (None,)
    return _decode(self.model, self.params, latents, axes[0])


def load_autoencoder(
  vae: str,
  dtype: Dtype,
  channels: int,
  placement: jax.sharding.Sharding | None = None,
) -> Autoencoder:
  """The autoencoder of a run.

  Args:
    vae: folder or hub id, as `config.data.vae`.
    dtype: compute type.
    channels: of the latents that the network takes.
    placement: where the parameters lie; None for the first device.

  Raises:
    SettingError: there is none of that name, or its latents have other channels.
  """
  with renamed_in_errors({"vae": "config.data.vae"}):
    autoencoder = Autoencoder.load(vae, dtype, sharding=placement)
  if autoencoder.model.latent_channels != channels:
    raise SettingError(
      "config.model.in_channels",
      channels,
      f"must be {autoencoder.model.latent_channels}, the latent channels of "
      f"config.data.vae = {vae!r}",
    )
  return autoencoder


@functools.partial(jax.jit, static_argnames=("model", "axes"))
def _decode(
  model: AutoencoderKL, params: Params, latents: Array, axes: tuple[str, ...] | None
) -> Array:
  """Decodes latents; `axes` of the mesh share the images, None for no sharing."""

  def decode(params: Params, latents: Array) -> Array:
    return decode_in_slices(model, params, model.unscale(latents))

  mesh = jax.sharding.get_abstract_mesh()
  if not axes or len(latents) % math.prod(mesh.shape[axis] for axis in axes):
    return decode(params, latents)
  # Sharded by hand: JAX would run the loop over slices on the whole batch.
  replicated, over_batch = PartitionSpec(), PartitionSpec(axes)
  return jax.shard_map(
    decode,
    in_specs=(replicated, over_batch),
    out_specs=over_batch,
    check_vma=False,
  )(params, latents)


@functools.partial(jax.jit, static_argnums=0)
def _moments(model: AutoencoderKL, params: Params, images: Array) -> Array:
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 127.5 - 1
  output: Any = model.apply({"params": params}, images, method="encode")
  mean, logvar = output
  std = jnp.exp(0.5 * logvar) * model.scaling_factor
  return jnp.stack([model.scale(mean), std], axis=1)
