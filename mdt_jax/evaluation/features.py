"""Features of images, computed in batches on all devices.

A `FeatureFn` computes features. This module has three of them: `inception_features` for
FID, sFID, Inception score, precision and recall; and `pixel_features` and
`whole_images`, which need no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Num

from mdt_jax import sharding
from mdt_jax.errors import SettingError
from mdt_jax.models.inception import IMAGE_SIZE, Inception
from mdt_jax.types import Array, Params

# (parameters, images (B, H, W, C) in [0, 255], uint8 or float32) -> name: (B, D)
FeatureFn: TypeAlias = Callable[[Params, Array], dict[str, Array]]

PIXELS_A_SIDE = 8  # largest height and width of `pixel_features`


def inception_features(
  params: Params, images: Num[Array, "B H W 3"]
) -> dict[str, Float[Array, "B D"]]:
  """Features of the Inception network of 2015, as ADM's evaluator computes them.

  Args:
    params: parameters from `pretrained.torch_inception.load_inception`.
    images: in [0, 255], uint8 or float32.

  Returns:
    "pool3" (B, 2048), "spatial" (B, 2023) and "logits" (B, 1008), float32; see
    `models.inception.Inception`.

  Raises:
    SettingError: the images are not RGB.
  """
  if images.shape[-1] != 3:
    raise SettingError(
      "images", images.shape[1:], "Inception takes RGB images (H, W, 3)"
    )
  resized = tf1_resize(images, (IMAGE_SIZE, IMAGE_SIZE))
  found = Inception().apply({"params": params}, (resized - 128) / 128)
  assert isinstance(found, dict)
  return found


def pixel_features(
  params: Params, images: Num[Array, "B H W C"]
) -> dict[str, Float[Array, "B D"]]:
  """Pixels in [0, 1], averaged to at most 8x8 pixels; for small images.

  Args:
    params: unused.
    images: in [0, 255], uint8 or float32.

  Returns:
    "pixels" (B, min(H, 8) * min(W, 8) * C) float32.
  """
  del params
  batch, height, width, channels = images.shape
  sides = min(height, PIXELS_A_SIDE), min(width, PIXELS_A_SIDE)
  pixels = images.astype(jnp.float32) / 255
  small = jax.image.resize(pixels, (batch, *sides, channels), "linear")
  return {"pixels": small.reshape(batch, -1)}


def whole_images(
  params: Params, images: Num[Array, "B H W C"]
) -> dict[str, Float[Array, "B D"]]:
  """All pixels; for scores that look at the images themselves.

  Args:
    params: unused.
    images: in [0, 255], uint8 or float32.

  Returns:
    "image" (B, H * W * C) float32, in [0, 255].
  """
  del params
  return {"image": images.astype(jnp.float32).reshape(len(images), -1)}


def tf1_resize(
  images: Num[Array, "B H W C"], size: tuple[int, int]
) -> Float[Array, "B h w C"]:
  """Bilinear resize of TensorFlow 1: no half-pixel centres, no antialiasing.

  The function equals tf.compat.v1.image.resize_bilinear(align_corners=False), which
  published FIDs depend on. The top left pixels of input and output coincide, and the
  last pixels are repeated.

  Args:
    images: images of any range and dtype.
    size: (height, width) of the result.

  Returns:
    (B, height, width, C) float32 images in the range of the input.
  """
  images = images.astype(jnp.float32)
  for axis, length in ((2, size[1]), (1, size[0])):
    old = images.shape[axis]
    # float32 like TensorFlow, for the same rounding.
    place = np.arange(length, dtype=np.float32) * np.float32(old / length)
    low = np.floor(place).astype(np.int32)
    high = np.minimum(low + 1, old - 1)
    shape = [1] * images.ndim
    shape[axis] = length
    weight = (place - low).reshape(shape)
    left, right = (jnp.take(images, i, axis=axis) for i in (low, high))
    images = left + (right - left) * weight
  return images


class FeatureExtractor:
  """A jitted feature function that distributes each batch over the devices.

  All processes of a run must call the extractor together, with the same images.

  Args:
    function: any `FeatureFn`.
    params: first argument of the function; copied to each device.
    batch_size: number of images in a batch, over all devices; rounded up to a multiple
      of the number of devices that share a batch.
    mesh: devices, from `sharding.make_mesh`; None for all devices.

  Raises:
    SettingError: the batch size is below 1.
  """

  def __init__(
    self,
    function: FeatureFn,
    params: Params = None,
    batch_size: int = 64,
    mesh: Mesh | None = None,
  ):
    if batch_size < 1:
      raise SettingError("batch_size", batch_size, "must be at least 1")
    mesh = sharding.make_mesh() if mesh is None else mesh
    shards = sharding.batch_shards(mesh)
    self.batch_size = -(-batch_size // shards) * shards
    self._over_batch = sharding.over_batch(mesh)
    self._params = jax.device_put(params, sharding.replicated(mesh))
    self._function = jax.jit(function, out_shardings=self._over_batch)

  def sizes(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Number of features of an image (H, W, C), by name, without computing features."""
    images = jax.ShapeDtypeStruct((self.batch_size, *image_shape), np.uint8)
    found = jax.eval_shape(self._function, self._params, images)
    return {name: values.shape[1] for name, values in found.items()}

  def __call__(
    self, images: Num[np.ndarray, "B H W C"]
  ) -> dict[str, Float[Array, "B D"]]:
    """Features of at most `batch_size` images; does not wait for the devices."""
    count = len(images)
    # A shorter batch is filled up, so that one compilation serves all batches.
    filled = np.resize(images, (self.batch_size, *images.shape[1:]))
    placed = jax.make_array_from_callback(
      filled.shape, self._over_batch, lambda rows: filled[rows]
    )
    found = self._function(self._params, placed)
    return {name: values[:count] for name, values in found.items()}
