"""Formulas of scores: Frechet distance, Inception score, precision, recall.

The definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations).
`mdt_jax.evaluation.registry` lists which formula and which features a score uses.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from mdt_jax.errors import SettingError
from mdt_jax.types import Array

NUM_NEIGHBOURS = 3  # k of precision and recall
SPLIT_SIZE = 5000  # images in a split of the Inception score
_ROWS_A_BLOCK = 1024  # rows of features that are added to a covariance at once
_DISTANCES_A_BLOCK = 2**25  # distances that are computed at once: 128 MB


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Mean (D,) and covariance (D, D) of features, float64."""

  mean: Float[np.ndarray, " D"]
  covariance: Float[np.ndarray, "D D"]


class RunningStatistics:
  """Computes mean and covariance of features that arrive in parts, in float64.

  The update formula is that of Chan, Golub and LeVeque (1983). Memory does not grow
  with the number of features.
  """

  def __init__(self) -> None:
    self.count = 0
    self._mean: np.ndarray = np.zeros(())
    # Sum of (x - mean) (x - mean)^T over all features x.
    self._scatter: np.ndarray = np.zeros(())
    self._pending: list[np.ndarray] = []

  def add(self, features: Float[np.ndarray, "B D"]) -> None:
    """Adds features (B, D) of any float dtype."""
    self._pending.append(np.asarray(features, np.float64))
    # One large matrix product is faster than many small matrix products.
    if sum(map(len, self._pending)) >= _ROWS_A_BLOCK:
      self._join()

  def result(self) -> Statistics:
    """Mean and covariance of all features; the covariance is divided by N - 1.

    Raises:
      SettingError: fewer than two features were added.
    """
    self._join()
    if self.count < 2:
      raise SettingError("images", self.count, "a covariance needs at least 2 images")
    return Statistics(self._mean, self._scatter / (self.count - 1))

  def _join(self) -> None:
    """Adds the pending features to mean and scatter."""
    if not self._pending:
      return
    rows = np.concatenate(self._pending)
    self._pending = []
    total = self.count + len(rows)
    mean = rows.mean(axis=0)
    rows -= mean
    shift = mean - self._mean
    self._scatter = self._scatter + rows.T @ rows
    self._scatter += np.outer(shift, shift) * (self.count * len(rows) / total)
    self._mean = self._mean + shift * (len(rows) / total)
    self.count = total


def feature_statistics(features: Float[np.ndarray, "N D"]) -> Statistics:
  """Mean and covariance of features, without a second array of the features' size."""
  running = RunningStatistics()
  for start in range(0, len(features), _ROWS_A_BLOCK):
    running.add(features[start : start + _ROWS_A_BLOCK])
  return running.result()


def frechet_distance(
  first: Statistics | Float[np.ndarray, "N D"],
  second: Statistics | Float[np.ndarray, "M D"],
) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features.

  With C1 = F1 F1^T and C2 = F2 F2^T, tr (C1 C2)^(1/2) is the sum of the singular values
  of F1^T F2. This needs eigenvalues of symmetric matrices only, so the result is
  accurate for singular covariances too (fewer features than dimensions).

  Args:
    first: features (N, D), or statistics of features.
    second: features (M, D), or statistics of features.

  Returns:
    The squared 2-Wasserstein distance of the two Gaussians: FID for features "pool3",
    sFID for features "spatial".

  Raises:
    SettingError: the dimensions differ, or a set has fewer than two features.
  """
  a, b = (
    s if isinstance(s, Statistics) else feature_statistics(s) for s in (first, second)
  )
  if a.mean.shape != b.mean.shape:
    raise SettingError(
      "features",
      b.mean.shape,
      f"must have the same dimension as the first features, {a.mean.shape}",
    )
  product = _factor(a.covariance).T @ _factor(b.covariance)
  difference = a.mean - b.mean
  return float(
    difference @ difference
    + np.trace(a.covariance)
    + np.trace(b.covariance)
    - 2 * np.linalg.svd(product, compute_uv=False).sum()
  )


def is_covariance(matrix: Float[np.ndarray, "D D"]) -> bool:
  """Whether a finite matrix is symmetric and positive semidefinite, up to rounding.

  Other programs may have computed the matrix in half precision: 1e-3 of its largest
  entry counts as rounding.
  """
  rounding = 1e-3 * np.abs(matrix).max(initial=0)
  if np.abs(matrix - matrix.T).max(initial=0) > rounding:
    return False
  return bool(np.linalg.eigvalsh(matrix).min(initial=0) >= -rounding)


def _factor(matrix: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D rank"]:
  """F with F F^T = matrix, for a symmetric positive semidefinite matrix."""
  values, vectors = np.linalg.eigh(matrix)
  # Eigenvalues below the rounding error count as zero: their roots would be large.
  rounding = max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
  kept = values > rounding
  return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(
  logits: Float[np.ndarray, "N classes"], split_size: int = SPLIT_SIZE
) -> float:
  """exp(E KL(p(y|x) || p(y))), averaged over splits (arXiv 1606.03498).

  Args:
    logits: logits of Inception without the bias, like ADM. The order of the images
      matters, because the splits are consecutive images.
    split_size: number of images in a split; the last split may be smaller.

  Raises:
    SettingError: there are no logits.
  """
  if not len(logits):
    raise SettingError("images", 0, "the Inception score needs at least 1 image")
  scores = []
  for start in range(0, len(logits), split_size):
    part = np.asarray(logits[start : start + split_size], np.float64)
    part -= part.max(axis=1, keepdims=True)
    log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class with probability 0 adds 0; 0 log 0 would be NaN.
    log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
    scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
  return float(np.mean(scores))


def precision_recall(
  real: Float[np.ndarray, "N D"],
  generated: Float[np.ndarray, "M D"],
  num_neighbours: int = NUM_NEIGHBOURS,
) -> tuple[float, float]:
  """Improved precision and recall (arXiv 1904.06991), on the default device.

  Each feature of a set has a sphere, whose radius is the distance to the k-th nearest
  neighbour in the set. The manifold of a set is the union of the spheres. Time grows
  with the square of the number of features. Distances are computed in blocks, so they
  take little memory.

  Args:
    real: features of real images.
    generated: features of generated images.
    num_neighbours: k.

  Returns:
    (precision, recall): the share of generated features in the manifold of the real
    features, and the share of real features in the manifold of the generated features.
    Distances are float32; ADM uses float16 unless it overflows, so ADM's scores are
    less precise.

  Raises:
    SettingError: a set has k or fewer features.
  """
  for name, features in (("real", real), ("generated", generated)):
    if len(features) <= num_neighbours:
      raise SettingError(
        f"{name} images",
        len(features),
        f"precision and recall need more than {num_neighbours}",
      )
  # Centring keeps the distances and reduces rounding errors.
  center = real.mean(axis=0, dtype=np.float64)
  a, b = (
    jnp.asarray(np.subtract(x, center, dtype=np.float32, casting="unsafe"))
    for x in (real, generated)
  )
  real_radii, generated_radii = _radii(a, num_neighbours), _radii(b, num_neighbours)
  precision = _share_inside(b, a, real_radii)
  recall = _share_inside(a, b, generated_radii)
  return precision, recall


def _radii(features: Float[Array, "N D"], num_neighbours: int) -> Float[Array, " N"]:
  """Squared distance of each feature to its k-th nearest neighbour."""
  # The nearest neighbour is the feature itself, hence k + 1. The column is selected
  # outside of jit: otherwise XLA on CPUs replaces top_k by a sort of whole rows.
  nearest = [
    _smallest(block, features, num_neighbours + 1)
    for block in _blocks(features, len(features))
  ]
  return jnp.concatenate(nearest)[:, num_neighbours]


def _share_inside(
  points: Float[Array, "N D"], features: Float[Array, "M D"], radii: Float[Array, " M"]
) -> float:
  """The share of points that lie in the sphere of at least one feature."""
  inside = [
    np.asarray(_is_inside(block, features, radii))
    for block in _blocks(points, len(features))
  ]
  return float(np.concatenate(inside).mean())


def _blocks(points: Float[Array, "N D"], num_features: int) -> list[Array]:
  """Splits points into blocks with at most `_DISTANCES_A_BLOCK` distances each."""
  size = max(1, _DISTANCES_A_BLOCK // num_features)
  return [points[start : start + size] for start in range(0, len(points), size)]


@functools.partial(jax.jit, static_argnums=2)
def _smallest(
  block: Float[Array, "N D"], features: Float[Array, "M D"], count: int
) -> Float[Array, "N count"]:
  """The `count` smallest squared distances of each point, in ascending order."""
  return -jax.lax.top_k(-_squared_distances(block, features), count)[0]


@jax.jit
def _is_inside(
  block: Float[Array, "N D"], features: Float[Array, "M D"], radii: Float[Array, " M"]
) -> Bool[Array, " N"]:
  """Whether each point lies in the sphere of at least one feature."""
  return (_squared_distances(block, features) <= radii).any(axis=1)


def _squared_distances(
  a: Float[Array, "N D"], b: Float[Array, "M D"]
) -> Float[Array, "N M"]:
  """|a - b|^2 = |a|^2 - 2 a b + |b|^2 for all pairs."""
  products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  norms_a, norms_b = (jnp.square(x).sum(axis=1) for x in (a, b))
  return jnp.maximum(norms_a[:, None] - 2 * products + norms_b, 0)
