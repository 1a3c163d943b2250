"""`Summary`: the features of a set of images from which scores are computed."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from mdt_jax.data.sources import Source
from mdt_jax.evaluation.metrics import Statistics


@dataclasses.dataclass(frozen=True)
class Summary:
  """Features of a set of images; a score compares two summaries.

  Attributes:
    statistics: mean and covariance over all images, by name of the features.
    features: (N, D) float32 features of each image, by name of the features.
    labels: (N,) labels of the images; None if there are no labels or no score needs
      labels.
    conditions: (N, D) vectors of the conditions that are arrays; None if there are none
      or no score needs them.
    source: the data of the run; only in the summary of the real images, and only if a
      score asks the data itself.
  """

  statistics: dict[str, Statistics]
  features: dict[str, Float[np.ndarray, "N D"]]
  labels: Int[np.ndarray, " N"] | None = None
  conditions: Float[np.ndarray, "N D"] | None = None
  source: Source | None = None
