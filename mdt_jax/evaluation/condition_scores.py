"""A score of conditions that are arrays, which needs no network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from mdt_jax.models.array_conditions import MASK_SUFFIX

CANDIDATES = 100  # conditions among which that of an image is searched, at most
# Regularisation, as shares of the mean variance of a pixel; the best one is chosen.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 5  # one of so many real images chooses the regularisation


def condition_vectors(
  arrays: Mapping[str, np.ndarray],
) -> Float[np.ndarray, "N D"] | None:
  """Joins the arrays of conditions to one vector for each image; None without arrays.

  Args:
    arrays: name -> (N, V), or (N, S, V), of which the mean over the tokens counts; and
      their masks (N, S).
  """
  found = []
  for name in sorted(arrays):
    array = np.asarray(arrays[name], np.float64)
    if name.endswith(MASK_SUFFIX) and name.removesuffix(MASK_SUFFIX) in arrays:
      continue
    if array.ndim == 3:
      mask = np.asarray(arrays.get(name + MASK_SUFFIX, np.ones(array.shape[:2]))) > 0
      total = np.where(mask[..., None], array, 0).sum(axis=1)
      array = total / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    found.append(array)
  return np.concatenate(found, axis=1) if found else None


def retrieval_accuracy(
  real: Float[np.ndarray, "N P"],
  real_conditions: Float[np.ndarray, "N D"],
  generated: Float[np.ndarray, "M P"],
  conditions: Float[np.ndarray, "M D"],
) -> float:
  """Share of images whose condition is found again among up to 100 conditions.

  A ridge regression, fitted to real images, predicts the condition from the pixels. The
  found condition is that with the smallest angle to the prediction, after the mean of
  the real conditions is subtracted and each number is divided by its deviation.
  Generated images are searched in groups of `CANDIDATES`. Equal conditions count as
  found.

  Args:
    real, real_conditions: pixels and conditions of real images.
    generated, conditions: pixels and conditions of generated images.

  Returns:
    The share, in [0, 1]. By chance, it is 1 / (number of different conditions in a
    group).
  """
  shift, scale = real_conditions.mean(axis=0), real_conditions.std(axis=0)
  scale = np.where(scale > 1e-6, scale, np.inf)  # constant numbers tell nothing
  targets = (real_conditions - shift) / scale
  center = real.mean(axis=0)
  pixels = np.asarray(real, np.float64) - center
  held_out = np.arange(len(pixels)) % HELD_OUT == 0
  errors = {
    ridge: np.square(
      pixels[held_out] @ _fit(pixels[~held_out], targets[~held_out], ridge)
      - targets[held_out]
    ).mean()
    for ridge in RIDGES
  }
  weights = _fit(pixels, targets, min(errors, key=lambda ridge: errors[ridge]))
  predicted = _normed((np.asarray(generated, np.float64) - center) @ weights)
  wanted = (conditions - shift) / scale
  hits = 0
  for start in range(0, len(wanted), CANDIDATES):
    some = wanted[start : start + CANDIDATES]
    best = (predicted[start : start + CANDIDATES] @ _normed(some).T).argmax(axis=1)
    hits += np.isclose(some[best], some).all(axis=1).sum()
  return float(hits / len(wanted))


def _fit(pixels: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
  """Solves the ridge regression (P, D) from pixels (N, P) to targets (N, D)."""
  products = pixels.T @ pixels
  penalty = ridge * np.trace(products) / len(products)
  # A positive penalty, also for images that are all alike.
  products[np.diag_indices_from(products)] += max(penalty, 1e-12)
  return np.linalg.solve(products, pixels.T @ targets)


def _normed(vectors: np.ndarray) -> np.ndarray:
  """Divides each row by its length."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
