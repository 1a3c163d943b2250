"""Distances between sets of features: Frechet, Inception score, precision and recall.

The definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mdt_jax.errors import SettingError, check_choice

Array = jax.Array

INCEPTION_METRICS = ("fid", "sfid", "is", "precision", "recall")  # of ADM
PIXEL_METRICS = ("frechet", "accuracy", "diversity")  # without a network
METRICS = (*INCEPTION_METRICS, *PIXEL_METRICS)

NUM_NEIGHBOURS = 3  # of precision and recall
SPLIT_SIZE = 5000  # of the Inception score
_ROWS_A_BLOCK = 1024  # features added to a covariance at a time
_DISTANCES_A_BLOCK = 2**25  # computed at a time: 128 MB


def check_metrics(setting: str, names: Sequence[str], has_inception: bool) -> None:
  """Raises SettingError for a score that is none, or needs a network not given."""
  if not names:
    raise SettingError(setting, "", f"must be some of {', '.join(METRICS)}")
  for name in names:
    check_choice(setting, name, METRICS)
    if name in INCEPTION_METRICS and not has_inception:
      raise SettingError(
        setting, name, "needs the weights of Inception: see docs/evaluation.md"
      )


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Mean (D,) and covariance (D, D) of features, float64."""

  mean: np.ndarray
  covariance: np.ndarray


class RunningStatistics:
  """Mean and covariance of features that come in parts, in the memory of (D, D).

  Parts are joined as in Chan, Golub and LeVeque (1983), in float64.
  """

  def __init__(self):
    self.count = 0
    self._mean: np.ndarray | float = 0.0
    self._scatter: np.ndarray | float = 0.0  # sum of outer products about the mean
    self._pending: list[np.ndarray] = []

  def add(self, features: np.ndarray) -> None:
    """Takes features (B, D) of any float type."""
    self._pending.append(np.asarray(features, np.float64))
    # A large product of matrices takes a fraction of the time of many small ones.
    if sum(map(len, self._pending)) >= _ROWS_A_BLOCK:
      self._join()

  def result(self) -> Statistics:
    """Of all that was added; the covariance is that of a sample, over N - 1.

    Raises:
      SettingError: fewer than two features were added.
    """
    self._join()
    if self.count < 2:
      raise SettingError("images", self.count, "a covariance needs at least 2 images")
    return Statistics(self._mean, self._scatter / (self.count - 1))

  def _join(self) -> None:
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


def feature_statistics(features: np.ndarray) -> Statistics:
  """Of features (N, D); no second array of their size is made."""
  running = RunningStatistics()
  for start in range(0, len(features), _ROWS_A_BLOCK):
    running.add(features[start : start + _ROWS_A_BLOCK])
  return running.result()


def frechet_distance(
  first: Statistics | np.ndarray, second: Statistics | np.ndarray
) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features.

  tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): symmetric
  roots alone, which are as exact for singular covariances (fewer features than
  dimensions) as for others, where the root of the product is not.

  Args:
    first, second: features (N, D), or statistics of them.

  Returns:
    The squared 2-Wasserstein distance of the two Gaussians; FID where the features are
    "pool3", sFID where they are "spatial".

  Raises:
    SettingError: the dimensions differ, or a set has fewer than two features.
  """
  first, second = (
    s if isinstance(s, Statistics) else feature_statistics(s) for s in (first, second)
  )
  if first.mean.shape != second.mean.shape:
    raise SettingError(
      "features",
      second.mean.shape,
      f"must have the dimensions of the others, {first.mean.shape}",
    )
  roots = _symmetric_root(first.covariance) @ _symmetric_root(second.covariance)
  difference = first.mean - second.mean
  return float(
    difference @ difference
    + np.trace(first.covariance)
    + np.trace(second.covariance)
    - 2 * np.linalg.svd(roots, compute_uv=False).sum()
  )


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  # Eigenvalues below rounding are zeros, whose roots would be large.
  rounding = max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
  values = np.where(values > rounding, values, 0)
  return (vectors * np.sqrt(values)) @ vectors.T


def inception_score(logits: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
  """exp(E KL(p(y|x) || p(y))), the mean of it over splits (arXiv 1606.03498).

  Args:
    logits: (N, classes), in the order of the images, which makes the splits; ADM's
      have no bias.
    split_size: images in a split; the last one may be smaller.

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
    # A class that no image has adds nothing.
    log_marginal = np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))
    scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
  return float(np.mean(scores))


def precision_recall(
  real: np.ndarray, generated: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS
) -> tuple[float, float]:
  """Improved precision and recall (arXiv 1904.06991), on the default device.

  A point lies on the manifold of a set where it is as close to one of its points as
  that one's k-th nearest neighbour is. Time goes with the square of the number of
  features; besides those, memory is bounded.

  Args:
    real, generated: features (N, D) and (M, D).
    num_neighbours: k.

  Returns:
    (precision, recall): the share of generated features on the manifold of the real
    ones, and of real ones on that of the generated. Distances are float32; ADM's are
    float16 where these are finite, which makes its scores coarser.

  Raises:
    SettingError: a set has no more than k features.
  """
  for name, features in (("real", real), ("generated", generated)):
    if len(features) <= num_neighbours:
      raise SettingError(
        f"{name} images",
        len(features),
        f"precision and recall need more than {num_neighbours}",
      )
  # Distances stay, and their rounding is less.
  center = real.mean(axis=0, dtype=np.float64)
  real, generated = (
    jnp.asarray(np.subtract(x, center, dtype=np.float32, casting="unsafe"))
    for x in (real, generated)
  )
  real_radii = _radii(real, num_neighbours)
  generated_radii = _radii(generated, num_neighbours)
  precision = _share_inside(generated, real, real_radii)
  recall = _share_inside(real, generated, generated_radii)
  return precision, recall


def _radii(features: Array, num_neighbours: int) -> Array:
  """(N,) squared distance of each feature to its k-th nearest neighbour."""
  # The nearest is the feature itself. XLA on CPUs would sort whole rows if it saw, in
  # the function it compiles, that one of the smallest alone is wanted.
  nearest = [
    _smallest(block, features, num_neighbours + 1)
    for block in _blocks(features, len(features))
  ]
  return jnp.concatenate(nearest)[:, num_neighbours]


def _share_inside(points: Array, features: Array, radii: Array) -> float:
  """The share of points that lie in the sphere of at least one feature."""
  inside = [
    np.asarray(_is_inside(block, features, radii))
    for block in _blocks(points, len(features))
  ]
  return float(np.concatenate(inside).mean())


def _blocks(points: Array, num_features: int) -> list[Array]:
  size = max(1, _DISTANCES_A_BLOCK // num_features)
  return [points[start : start + size] for start in range(0, len(points), size)]


@functools.partial(jax.jit, static_argnums=2)
def _smallest(block: Array, features: Array, count: int) -> Array:
  """(N, count) smallest squared distances, in rising order."""
  return -jax.lax.top_k(-_squared_distances(block, features), count)[0]


@jax.jit
def _is_inside(block: Array, features: Array, radii: Array) -> Array:
  return (_squared_distances(block, features) <= radii).any(axis=1)


def _squared_distances(a: Array, b: Array) -> Array:
  """(N, M) of (N, D) and (M, D)."""
  products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  norms_a, norms_b = (jnp.square(x).sum(axis=1) for x in (a, b))
  return jnp.maximum(norms_a[:, None] - 2 * products + norms_b, 0)
