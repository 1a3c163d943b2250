"""What turns latents, timesteps, labels and positions into vectors."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.models.partitioning import gather, linear, parameter_axes

Array = jax.Array
Dtype = Any

NUM_FREQUENCIES = 256  # of the timestep embedding
MAX_PERIOD = 10_000

# Linear layers of the released code: Xavier uniform kernels, zero biases.
linear_init = nn.initializers.xavier_uniform()
normal_init = nn.initializers.normal(0.02)


def sincos_positions(hidden_size: int, grid_size: int) -> np.ndarray:
  """2-D sin-cos position embedding, the width coordinate first.

  Args:
    hidden_size: D, divisible by 4.
    grid_size: tokens along each side.

  Returns:
    (grid_size**2, D) float32, in row-major order: for each coordinate D/4 sines,
    then D/4 cosines (MAE, arXiv 2111.06377).
  """
  quarter = hidden_size // 4
  frequencies = MAX_PERIOD ** -(np.arange(quarter, dtype=np.float64) / quarter)
  rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
  angles = [np.outer(coordinate, frequencies) for coordinate in (columns, rows)]
  waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(waves, axis=1).astype(np.float32)


def timestep_frequencies(t: Array) -> Array:
  """Sinusoids of a timestep (B,), integer or not: (B, 256), cosines first."""
  half = NUM_FREQUENCIES // 2
  exponents = -math.log(MAX_PERIOD) * np.arange(half, dtype=np.float32) / half
  # Rounded once, from float64, as PyTorch's exp is in all but two of 128 entries: an
  # error in the last bit is multiplied by t, and XLA's and NumPy's float32 have more.
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def drop_labels(key: Array, labels: Array, num_classes: int, rate: float) -> Array:
  """Replaces labels (B,) by the null label `num_classes` with probability `rate`."""
  dropped = jax.random.bernoulli(key, rate, labels.shape)
  return jnp.where(dropped, num_classes, labels)


class PatchEmbed(nn.Module):
  """Images (B, H, W, C) to tokens (B, (H/p)(W/p), D), one linear map a patch."""

  patch_size: int
  hidden_size: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Array) -> Array:
    b, h, w, c = images.shape
    p = self.patch_size
    patches = images.reshape(b, h // p, p, w // p, p, c)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
    return linear(
      self.hidden_size,
      "linear",
      "patch_embed/",
      kernel_init=linear_init,
      dtype=self.dtype,
    )(patches)


class TimestepEmbed(nn.Module):
  """Timesteps (B,) to vectors (B, D): sinusoids, then linear, SiLU, linear."""

  hidden_size: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, t: Array) -> Array:
    x = timestep_frequencies(t).astype(self.dtype)
    for name in ("fc1", "fc2"):
      x = nn.silu(x) if name == "fc2" else x
      x = linear(
        self.hidden_size,
        name,
        "timestep_embed/",
        kernel_init=normal_init,
        dtype=self.dtype,
      )(x)
    return x


class LabelEmbed(nn.Module):
  """Labels (B,) to vectors (B, D); the last row stands for "no label".

  The null row exists where `dropout` is above 0, as in the released code.
  """

  num_classes: int
  hidden_size: int
  dropout: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, labels: Array, train: bool = False) -> Array:
    rows = self.num_classes + (self.dropout > 0)
    table = self.param("table", normal_init, (rows, self.hidden_size), jnp.float32)
    if train and self.dropout > 0:
      key = self.make_rng("label_dropout")
      labels = drop_labels(key, labels, self.num_classes, self.dropout)
    table = gather(jnp.asarray(table, self.dtype), parameter_axes("label_embed/table"))
    return table[labels]
