"""Images to features: in batches over the devices, by any function.

What is computed of an image is a `FeatureFn`. Two are here: `inception_features`, which
FID, sFID, the Inception score, precision and recall are of, and `pixel_features`, which
need no network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mdt_jax import sharding
from mdt_jax.errors import SettingError
from mdt_jax.models.inception import IMAGE_SIZE, Inception

Array = jax.Array
# (parameters, images (B, H, W, C) in [0, 255], uint8 or float32) -> name: (B, D)
FeatureFn = Callable[[Any, Array], dict[str, Array]]

PIXELS_A_SIDE = 8  # of `pixel_features`


def inception_features(params: Any, images: Array) -> dict[str, Array]:
  """Features of the Inception of 2015, as ADM's evaluator computes them.

  Args:
    params: of `pretrained.torch_inception.load_inception`.
    images: (B, H, W, 3) in [0, 255].

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
  return Inception().apply({"params": params}, (resized - 128) / 128)


def pixel_features(params: Any, images: Array) -> dict[str, Array]:
  """Pixels in [0, 1], averaged to at most 8x8; for small data.

  Returns:
    "pixels" (B, min(H, 8) min(W, 8) C) float32.
  """
  del params
  batch, height, width, channels = images.shape
  sides = min(height, PIXELS_A_SIDE), min(width, PIXELS_A_SIDE)
  pixels = images.astype(jnp.float32) / 255
  small = jax.image.resize(pixels, (batch, *sides, channels), "linear")
  return {"pixels": small.reshape(batch, -1)}


def tf1_resize(images: Array, size: tuple[int, int]) -> Array:
  """Bilinear resize of TensorFlow 1: no half-pixel centres, no antialiasing.

  As tf.compat.v1.image.resize_bilinear(align_corners=False) does. Every published FID
  hangs on it: the top left pixels coincide, and the last ones are repeated.

  Args:
    images: (B, H, W, C).
    size: height and width of the result.

  Returns:
    (B, *size, C) float32, in the range of the images.
  """
  images = images.astype(jnp.float32)
  for axis, length in ((2, size[1]), (1, size[0])):
    old = images.shape[axis]
    # In float32, as there.
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
  """A feature function, jitted, with batches spread over the devices.

  Of several processes all must call it, with the same images.

  Args:
    function: any `FeatureFn`.
    params: its first argument; copied to every device.
    batch_size: images at a time, over all devices; rounded up to a multiple of those
      that share a batch.
    mesh: of `sharding.make_mesh`; all devices unless given.
  """

  def __init__(
    self,
    function: FeatureFn,
    params: Any = None,
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
    """How many features by name images (H, W, C) have; computes none."""
    images = jax.ShapeDtypeStruct((self.batch_size, *image_shape), np.uint8)
    found = jax.eval_shape(self._function, self._params, images)
    return {name: values.shape[1] for name, values in found.items()}

  def __call__(self, images: np.ndarray) -> dict[str, Array]:
    """Features of at most `batch_size` images; does not wait for the devices."""
    count = len(images)
    # A shorter batch is filled up, so that one compilation serves all.
    filled = np.resize(images, (self.batch_size, *images.shape[1:]))
    placed = jax.make_array_from_callback(
      filled.shape, self._over_batch, lambda rows: filled[rows]
    )
    found = self._function(self._params, placed)
    return {name: values[:count] for name, values in found.items()}
