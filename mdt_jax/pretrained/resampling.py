"""Resamples parameters for another input size or another patch size.

Positions and bias tables are sampled on a grid; patch embeddings and final layers on
the pixels of a patch. Everything is computed in float64 by NumPy.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mdt_jax.sizes import Size, height_width

# Keys' cubic convolution (1981) with this parameter reproduces quadratic polynomials;
# PyTorch's bicubic has -0.75, which does not even reproduce straight lines.
_KEYS = -0.5


def bicubic_weights(
  size: int, new_size: int, points: Float[np.ndarray, " new_size"] | None = None
) -> Float[np.ndarray, "new_size size"]:
  """Weights of a one-dimensional cubic interpolation, whose rows sum to 1.

  Args:
    size: number of samples, at least 1.
    new_size: number of interpolated values, at least 1.
    points: where to interpolate, in samples from the first one on. None: both grids
      cover the same interval, as pixels of two sizes of an image do.

  Returns:
    (new_size, size) float64, as of `jax.image.resize` without antialias. Near the ends,
    weights of missing samples are left out.
  """
  if points is None:
    points = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
  x = np.abs(points[:, None] - np.arange(size))
  near = ((_KEYS + 2) * x - (_KEYS + 3)) * x**2 + 1
  far = ((x - 5) * x + 8) * x * _KEYS - 4 * _KEYS
  weights = np.where(x <= 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


def resize_positions(
  positions: Float[np.ndarray, "L D"], grid: Size, new_grid: Size
) -> Float[np.ndarray, "M D"]:
  """Resamples a position embedding bicubically on the grid of tokens.

  Args:
    positions: (L, D), one row for each token, in row-major order.
    grid, new_grid: tokens along each side, or (tokens of a column, tokens of a row).

  Returns:
    (M, D) float32.
  """
  (height, width), (new_height, new_width) = map(height_width, (grid, new_grid))
  return _resize(
    positions,
    bicubic_weights(height, new_height),
    bicubic_weights(width, new_width),
  )


def resize_bias_table(
  table: Float[np.ndarray, "R heads"], grid: Size, new_grid: Size
) -> Float[np.ndarray, "S heads"]:
  """Resamples a table of relative position biases bicubically.

  A distance of one token in the old grid is a distance of new / old tokens in the new
  one; the bias of larger distances than the old grid has is that of the largest.

  Args:
    table: ((2H - 1)(2W - 1) + extra, heads), see `embeddings.relative_position_index`.
      The extra rows at the end, which no pair of tokens reads, are kept.
    grid, new_grid: H = W, tokens along each side, or (H, W).

  Returns:
    ((2H' - 1)(2W' - 1) + extra, heads) float32.
  """
  sizes = list(zip(height_width(grid), height_width(new_grid), strict=True))
  weights = []
  for old, new in sizes:
    distances = np.clip(np.arange(1 - new, new) * (old / new), 1 - old, old - 1)
    weights.append(bicubic_weights(2 * old - 1, 2 * new - 1, distances + old - 1))
  used = weights[0].shape[1] * weights[1].shape[1]
  return np.concatenate([_resize(table[:used], *weights), table[used:]])


def resize_patch_embedding(
  kernel: Float[np.ndarray, "p p C D"], new_patch: int
) -> Float[np.ndarray, "q q C D"]:
  """Resamples the kernel of a patch embedding (FlexiViT, arXiv 2212.08013, eq. 2 to 4).

  If `new_patch` is larger than p, the embedding of an enlarged patch equals that of the
  patch: the kernel is multiplied by the pseudo-inverse of the transposed enlargement.

  Args:
    kernel: (p, p, C, D): p x p pixels, C channels, width D.
    new_patch: q, pixels along a side of the new patch.

  Returns:
    (q, q, C, D) float32.
  """
  inverse = np.linalg.pinv(bicubic_weights(len(kernel), new_patch).T)  # (q, p)
  return _both_axes(inverse, inverse, kernel)


def resize_patches(
  patches: Float[np.ndarray, "p p *C"], new_patch: int
) -> Float[np.ndarray, "q q *C"]:
  """Resamples patches bicubically, or the last layer, which is linear, that draws them.

  Args:
    patches: (p, p, …).
    new_patch: q, pixels along a side of the new patch.

  Returns:
    (q, q, …) float32.
  """
  weights = bicubic_weights(len(patches), new_patch)
  return _both_axes(weights, weights, patches)


def resize_last_layer(
  layer: Float[np.ndarray, "*inputs outputs"],
  patch: int,
  new_patch: int,
  channels: int,
  new_channels: int,
) -> Float[np.ndarray, "*inputs new_outputs"]:
  """Resamples the last linear layer for another patch size or number of channels.

  Args:
    layer: kernel (D, p p C) or bias (p p C,); outputs in the order (p, p, C).
    patch, new_patch: p and q, pixels along a side of a patch.
    channels, new_channels: C and C', output channels: the last ones are left out, or
      are 0, as in a new network. For a learned variance, 0 is the middle of its range.

  Returns:
    (D, q q C') or (q q C',), float32.
  """
  inputs = layer.shape[:-1]
  pixels = layer.reshape(*inputs, patch, patch, channels)[..., :new_channels]
  missing = max(0, new_channels - channels)
  pixels = np.pad(pixels, [(0, 0)] * (pixels.ndim - 1) + [(0, missing)])
  if patch != new_patch:
    first = np.moveaxis(pixels, (-3, -2), (0, 1))
    pixels = np.moveaxis(resize_patches(first, new_patch), (0, 1), (-3, -2))
  return np.ascontiguousarray(pixels.reshape(*inputs, -1), np.float32)


def _resize(
  rows: Float[np.ndarray, "L D"],
  vertical: Float[np.ndarray, "h H"],
  horizontal: Float[np.ndarray, "w W"],
) -> Float[np.ndarray, "M D"]:
  """Resamples the rows of a table, which are samples of a grid of H x W."""
  grid = rows.reshape(vertical.shape[1], horizontal.shape[1], -1)
  return _both_axes(vertical, horizontal, grid).reshape(-1, rows.shape[-1])


def _both_axes(
  vertical: Float[np.ndarray, "h H"],
  horizontal: Float[np.ndarray, "w W"],
  array: Float[np.ndarray, "H W *C"],
) -> Float[np.ndarray, "h w *C"]:
  """Multiplies the first two axes of an array by matrices."""
  found = np.einsum("hH,wW,HW...->hw...", vertical, horizontal, array, optimize=True)
  return found.astype(np.float32)
