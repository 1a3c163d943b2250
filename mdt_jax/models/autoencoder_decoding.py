"""Memory-saving decoding: a batch in slices, large images in tiles."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from mdt_jax.errors import SettingError
from mdt_jax.models.autoencoder_kl import AutoencoderKL, decode
from mdt_jax.types import Array, Params


@functools.partial(jax.jit, static_argnames=("model", "slice_size"))
def decode_in_slices(
  model: AutoencoderKL,
  params: Params,
  latents: Float[Array, "B h w C"],
  slice_size: int = 8,
) -> Float32[Array, "B H W out_channels"]:
  """Decodes `slice_size` images at a time, to save memory.

  Args:
    model: the autoencoder.
    params: its parameters.
    latents: (B, h, w, C), not scaled, as for `AutoencoderKL.decode`.
    slice_size: images decoded at a time.

  Returns:
    The images of `AutoencoderKL.decode`.

  Raises:
    SettingError: slice_size is below 1.
  """
  if slice_size < 1:
    raise SettingError("slice_size", slice_size, "must be at least 1")

  def decode_one(latent: Array) -> Array:
    return decode(model, params, latent[None])[0]

  return jax.lax.map(decode_one, latents, batch_size=slice_size)


@functools.partial(jax.jit, static_argnames=("model", "tile_size", "overlap"))
def decode_in_tiles(
  model: AutoencoderKL,
  params: Params,
  latents: Float[Array, "B h w C"],
  tile_size: int = 64,
  overlap: int = 16,
) -> Float32[Array, "B H W out_channels"]:
  """Decodes large images tile by tile, to save memory.

  Overlapping tiles are cross-faded. The images differ slightly from those of `decode`,
  because GroupNorm and attention see one tile at a time. Latents that fit into one tile
  are decoded by `decode`.

  Args:
    model: the autoencoder.
    params: its parameters.
    latents: (B, h, w, C), not scaled, of any height and width.
    tile_size: side of a tile, in latent pixels.
    overlap: smallest overlap of neighbouring tiles, in latent pixels.

  Returns:
    Images, about in [-1, 1], not clipped. H = h * downsampling.

  Raises:
    SettingError: `overlap` is not in [0, tile_size).
  """
  if not 0 <= overlap < tile_size:
    raise SettingError("overlap", overlap, f"must lie in [0, tile_size = {tile_size})")
  batch, height, width, channels = latents.shape
  if max(height, width) <= tile_size:
    return decode(model, params, latents)
  factor = model.downsampling
  tops, row_weights = _tiles(height, tile_size, overlap, factor)
  lefts, column_weights = _tiles(width, tile_size, overlap, factor)
  tile_shape = (batch, min(height, tile_size), min(width, tile_size), channels)

  def add_tile(images: Array, position: Array) -> tuple[Array, None]:
    row, column = position
    top, left = tops[row], lefts[column]
    tile = jax.lax.dynamic_slice(latents, (0, top, left, 0), tile_shape)
    weights = row_weights[row][:, None] * column_weights[column]
    decoded = decode(model, params, tile) * weights[..., None]
    corner = (0, factor * top, factor * left, 0)
    sums = decoded + jax.lax.dynamic_slice(images, corner, decoded.shape)
    return jax.lax.dynamic_update_slice(images, sums, corner), None

  positions = jnp.asarray(np.indices((len(tops), len(lefts))).reshape(2, -1).T)
  blank = jnp.zeros((batch, factor * height, factor * width, model.out_channels))
  return jax.lax.scan(add_tile, blank, positions)[0]


def _tiles(
  length: int, tile_size: int, overlap: int, factor: int
) -> tuple[Array, Array]:
  """Places n tiles of equal size evenly along an axis and weights their pixels.

  Returns:
    (starts, weights): starts (n,) in latent pixels; weights (n, factor * tile_size)
    float32. Weights ramp up and down over the overlaps and sum to 1 at each pixel.
  """
  tile_size = min(tile_size, length)
  count = 1
  if length > tile_size:
    count += math.ceil((length - tile_size) / (tile_size - overlap))
  starts = np.linspace(0, length - tile_size, count).round().astype(int)
  inside = np.arange(factor * tile_size)
  # Distance of a pixel to the nearest edge of its tile, except edges of the image.
  before = np.where(starts[:, None] > 0, inside + 0.5, np.inf)
  after = np.where(starts[:, None] < length - tile_size, inside[::-1] + 0.5, np.inf)
  ramps = np.minimum(before, after).clip(max=max(1, factor * overlap))
  pixels = factor * starts[:, None] + inside
  sums = np.bincount(pixels.ravel(), ramps.ravel())
  return jnp.asarray(starts), jnp.asarray(ramps / sums[pixels], jnp.float32)
