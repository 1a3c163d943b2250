"""The Inception v3 network of FID (arXiv 1512.00567, released in 2015).

The weights are those of classify_image_graph_def.pb. The network differs from other
releases of Inception v3: 3x3 average pooling excludes the padding, the last block uses
max pooling instead of average pooling, and there are 1,008 classes. Module names follow
torchvision's `Inception3`, as in pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float32

from mdt_jax.types import Array

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # ADM's sFID uses the first 7 channels of mixed_6/conv
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Inception(nn.Module):
  """Computes the features of ADM's evaluator, in float32; for inference only.

  Batch normalisation is folded into kernels and biases by `pretrained.torch_inception`.
  """

  @nn.compact
  def __call__(
    self, images: Float32[Array, "B 299 299 3"]
  ) -> dict[str, Float32[Array, "B features"]]:
    """Computes the features of a batch of images.

    Args:
      images: (B, 299, 299, 3) float32, (x - 128) / 128 for pixels x in [0, 255].

    Returns:
      name -> float32 features:
        "pool3" (B, 2048), for FID, precision and recall;
        "spatial" (B, 2023), the first 7 channels of mixed_6/conv, for sFID;
        "logits" (B, 1008), without the bias, for the Inception score.
    """
    x = Conv(32, (3, 3), strides=2, padding="VALID", name="Conv2d_1a_3x3")(images)
    x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
    x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
    x = _halve(x)
    x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
    x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
    x = _halve(x)
    x = InceptionA(32, name="Mixed_5b")(x)
    x = InceptionA(64, name="Mixed_5c")(x)
    x = InceptionA(64, name="Mixed_5d")(x)
    x = InceptionB(name="Mixed_6a")(x)
    x = InceptionC(128, name="Mixed_6b")(x)
    x = InceptionC(160, name="Mixed_6c")(x)
    x = InceptionC(160, name="Mixed_6d")(x)
    # The 1x1 branch, mixed_6/conv, comes first in the block's output.
    spatial = x[..., :SPATIAL_CHANNELS]
    x = InceptionC(192, name="Mixed_6e")(x)
    x = InceptionD(name="Mixed_7a")(x)
    x = InceptionE(_average, name="Mixed_7b")(x)
    x = InceptionE(_maximum, name="Mixed_7c")(x)
    pool3 = x.mean(axis=(1, 2))
    logits = nn.Dense(
      NUM_CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc"
    )(pool3)
    return {
      "pool3": pool3,
      "spatial": spatial.reshape(len(x), -1),
      "logits": logits,
    }


class Conv(nn.Module):
  """A convolution with bias, then ReLU."""

  features: int
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.Conv(
      self.features,
      self.kernel_size,
      strides=self.strides,
      padding=self.padding,
      # By default, TPUs and GPUs round the inputs of a product below float32.
      precision=jax.lax.Precision.HIGHEST,
      name="conv",
    )(x)
    return nn.relu(x)


class InceptionA(nn.Module):
  """35x35 pixels; branches: 1x1, 5x5, two 3x3, and average pooling."""

  pool_features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = Conv(64, (1, 1), name="branch1x1")(x)
    b = Conv(48, (1, 1), name="branch5x5_1")(x)
    b = Conv(64, (5, 5), name="branch5x5_2")(b)
    c = Conv(64, (1, 1), name="branch3x3dbl_1")(x)
    c = Conv(96, (3, 3), name="branch3x3dbl_2")(c)
    c = Conv(96, (3, 3), name="branch3x3dbl_3")(c)
    d = Conv(self.pool_features, (1, 1), name="branch_pool")(_average(x))
    return jnp.concatenate([a, b, c, d], axis=-1)


class InceptionB(nn.Module):
  """35x35 to 17x17 pixels; branches: 3x3, two 3x3, and max pooling."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = Conv(384, (3, 3), strides=2, padding="VALID", name="branch3x3")(x)
    b = Conv(64, (1, 1), name="branch3x3dbl_1")(x)
    b = Conv(96, (3, 3), name="branch3x3dbl_2")(b)
    b = Conv(96, (3, 3), strides=2, padding="VALID", name="branch3x3dbl_3")(b)
    return jnp.concatenate([a, b, _halve(x)], axis=-1)


class InceptionC(nn.Module):
  """17x17 pixels; branches: 1x1, factorised 7x7, two of these, and average pooling."""

  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = Conv(192, (1, 1), name="branch1x1")(x)
    b = Conv(self.width, (1, 1), name="branch7x7_1")(x)
    b = Conv(self.width, (1, 7), name="branch7x7_2")(b)
    b = Conv(192, (7, 1), name="branch7x7_3")(b)
    c = Conv(self.width, (1, 1), name="branch7x7dbl_1")(x)
    c = Conv(self.width, (7, 1), name="branch7x7dbl_2")(c)
    c = Conv(self.width, (1, 7), name="branch7x7dbl_3")(c)
    c = Conv(self.width, (7, 1), name="branch7x7dbl_4")(c)
    c = Conv(192, (1, 7), name="branch7x7dbl_5")(c)
    d = Conv(192, (1, 1), name="branch_pool")(_average(x))
    return jnp.concatenate([a, b, c, d], axis=-1)


class InceptionD(nn.Module):
  """17x17 to 8x8 pixels; branches: 3x3, factorised 7x7 and 3x3, and max pooling."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = Conv(192, (1, 1), name="branch3x3_1")(x)
    a = Conv(320, (3, 3), strides=2, padding="VALID", name="branch3x3_2")(a)
    b = Conv(192, (1, 1), name="branch7x7x3_1")(x)
    b = Conv(192, (1, 7), name="branch7x7x3_2")(b)
    b = Conv(192, (7, 1), name="branch7x7x3_3")(b)
    b = Conv(192, (3, 3), strides=2, padding="VALID", name="branch7x7x3_4")(b)
    return jnp.concatenate([a, b, _halve(x)], axis=-1)


class InceptionE(nn.Module):
  """8x8 pixels; branches: 1x1, factorised 3x3, 3x3 and factorised 3x3, and pooling.

  `pool` is the 3x3 pooling of the last branch.
  """

  pool: Callable[[Array], Array]  # _average or _maximum

  @nn.compact
  def __call__(self, x: Array) -> Array:
    a = Conv(320, (1, 1), name="branch1x1")(x)
    b = Conv(384, (1, 1), name="branch3x3_1")(x)
    b1 = Conv(384, (1, 3), name="branch3x3_2a")(b)
    b2 = Conv(384, (3, 1), name="branch3x3_2b")(b)
    c = Conv(448, (1, 1), name="branch3x3dbl_1")(x)
    c = Conv(384, (3, 3), name="branch3x3dbl_2")(c)
    c1 = Conv(384, (1, 3), name="branch3x3dbl_3a")(c)
    c2 = Conv(384, (3, 1), name="branch3x3dbl_3b")(c)
    d = Conv(192, (1, 1), name="branch_pool")(self.pool(x))
    return jnp.concatenate([a, b1, b2, c1, c2, d], axis=-1)


def _halve(x: Array) -> Array:
  """3x3 max pooling with stride 2, without padding."""
  return nn.max_pool(x, (3, 3), strides=(2, 2))


def _average(x: Array) -> Array:
  """3x3 average pooling that excludes the padding."""
  return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
  """3x3 max pooling with stride 1."""
  return nn.max_pool(x, (3, 3), padding="SAME")
