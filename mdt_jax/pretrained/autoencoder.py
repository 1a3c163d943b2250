"""A pretrained autoencoder: encodes images to moments, decodes latents to images."""

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
from mdt_jax.sizes import Size, height_width
from mdt_jax.types import Array, Dtype, Params


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """An autoencoder network with its parameters.

  All latents of this class are shifted and scaled to about unit variance, as the
  diffusion model needs them.
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
    """Loads an autoencoder from a folder or from the Hugging Face hub.

    Args:
      name: folder or hub id; see `torch_vae.load_vae`.
      dtype: compute dtype.
      sharding: sharding of the parameters; None for the first device.

    Raises:
      SettingError: setting "vae": see `torch_vae.load_vae`.
    """
    return cls(*load_vae(name, dtype)).placed(sharding)

  def placed(self, sharding: jax.sharding.Sharding | None) -> Autoencoder:
    """Returns the autoencoder with its parameters on devices.

    If the devices belong to several processes, all of these processes must call this
    method together, and JAX compares their parameters.

    Args:
      sharding: sharding of the parameters; None for the first device.
    """
    return Autoencoder(self.model, jax.device_put(self.params, sharding))

  def check_scale(self, name: str | None, card: Mapping[str, Any]) -> None:
    """Checks that a latent set was scaled like the latents of this autoencoder.

    Args:
      name: name of this autoencoder, as the user typed it; for the message.
      card: card of the latent set, see `data.latents.read_card`.

    Raises:
      SettingError: scaling_factor, shift_factor, latents_mean or latents_std differ.
    """
    encoder = card.get("vae") or "another tool"
    for factor, own in self.scales().items():
      stored = card.get(factor)
      if own != stored:
        raise SettingError(
          "config.data.vae",
          name,
          f"must have {factor} = {stored}, with which {encoder} encoded the latents; "
          f"has {own}",
        )

  def scales(self) -> dict[str, Any]:
    """Returns the numbers that scale latents, as the card of a latent set holds them.

    Statistics by channel are None if the autoencoder has none.
    """
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    values = {name: getattr(self.model, name) for name in names}
    return {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in values.items()
    }

  def latent_shape(self, image_size: Size) -> tuple[int, int, int]:
    """Returns the shape (h, w, C) of the latents of an image; see `mdt_jax.sizes`."""
    factor = self.model.downsampling
    height, width = height_width(image_size, "image_size")
    return height // factor, width // factor, self.model.latent_channels

  def moments(
    self, images: Shaped[Array | np.ndarray, "B H W 3"]
  ) -> Float32[Array, "B 2 h w C"]:
    """Encodes images to mean and standard deviation of their latents.

    Args:
      images: (B, H, W, 3), uint8 in [0, 255] or floats in [-1, 1].

    Returns:
      (B, 2, h, w, C) float32, scaled; axis 1 is mean, standard deviation.
    """
    return _moments(self.model, self.params, images)

  def decode(
    self, latents: Float[Array | np.ndarray, "B h w C"]
  ) -> Float32[Array, "B H W 3"]:
    """Decodes latents to images.

    Inside `sharding.use_mesh`, the batch is sharded over the mesh if B is divisible by
    the number of devices that share a batch. With several processes, all processes must
    then call this method.

    Args:
      latents: (B, h, w, C), scaled.

    Returns:
      Images, about in [-1, 1], not clipped.
    """
    axes = spmd.logical_to_mesh_axes(("batch",)) or (None,)
    return _decode(self.model, self.params, latents, axes[0])


def read_autoencoder(vae: str, dtype: Dtype, channels: int) -> Autoencoder:
  """Reads the autoencoder of a run and checks its number of latent channels.

  Args:
    vae: folder or hub id, the value of `config.data.vae`.
    dtype: compute dtype.
    channels: number of channels of the diffusion network's input.

  Returns:
    The autoencoder, whose parameters are NumPy arrays; see `Autoencoder.placed`.

  Raises:
    SettingError: the autoencoder does not exist or cannot be loaded, or its latents
      have another number of channels.
  """
  with renamed_in_errors({"vae": "config.data.vae"}):
    autoencoder = Autoencoder(*load_vae(vae, dtype))
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
  """Decodes latents; shards the batch over the mesh `axes` unless `axes` is None."""

  def decode(params: Params, latents: Array) -> Array:
    return decode_in_slices(model, params, model.unscale(latents))

  mesh = jax.sharding.get_abstract_mesh()
  if not axes or len(latents) % math.prod(mesh.shape[axis] for axis in axes):
    return decode(params, latents)
  # With automatic sharding, each device would loop over slices of the whole batch.
  replicated, over_batch = PartitionSpec(), PartitionSpec(axes)
  return jax.shard_map(
    decode,
    in_specs=(replicated, over_batch),
    out_specs=over_batch,
    check_vma=False,
  )(params, latents)


@functools.partial(jax.jit, static_argnums=0)
def _moments(model: AutoencoderKL, params: Params, images: Array) -> Array:
  """Implements `Autoencoder.moments`."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 127.5 - 1
  output: Any = model.apply({"params": params}, images, method="encode")
  mean, logvar = output
  std = model.scale_std(jnp.exp(0.5 * logvar))
  return jnp.stack([model.scale(mean), std], axis=1)
