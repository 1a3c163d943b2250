"""What scores need to know of a set of images."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from mdt_jax.evaluation.metrics import Statistics


@dataclasses.dataclass(frozen=True)
class Summary:
  """Features of a set of images; two summaries give a score.

  Attributes:
    statistics: mean and covariance, by name of the features.
    features: features of each image, float32, by name of the features.
    labels: labels of the images; None without labels, or if no score needs labels.
  """

  statistics: dict[str, Statistics]
  features: dict[str, Float[np.ndarray, "N D"]]
  labels: Int[np.ndarray, " N"] | None = None
