"""How good are sampled digits? python -m benchmarks.digits_quality --samples=FILE.npz

Accuracy: the share of samples that a support vector classifier, fitted on the real
digits, recognises as the label asked for. Diversity: mean pairwise distance within a
class over that of the real digits, averaged over classes.
"""

from __future__ import annotations

import json

import numpy as np
from absl import app, flags

SAMPLES = flags.DEFINE_string("samples", None, "File of mdt_jax.sample.", required=True)


def measure(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Accuracy and diversity of uint8 digits (N, 8, 8, 1) with labels (N,)."""
  from sklearn.datasets import load_digits
  from sklearn.metrics import pairwise_distances
  from sklearn.svm import SVC

  real, real_labels = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(real, real_labels)
  samples = images.reshape(len(images), -1) / 255 * 16

  if min(np.bincount(labels)[np.unique(labels)]) < 2:
    raise app.UsageError("--samples: each class must have at least two images")

  def spread(x: np.ndarray) -> float:
    return pairwise_distances(x).sum() / (len(x) * (len(x) - 1))

  ratios = [
    spread(samples[labels == k]) / spread(real[real_labels == k])
    for k in np.unique(labels)
  ]
  return {
    "images": len(images),
    "accuracy": float(np.mean(classifier.predict(samples) == labels)),
    "diversity": float(np.mean(ratios)),
  }


def main(argv: list[str]) -> None:
  del argv
  with np.load(SAMPLES.value) as data:
    print(json.dumps(measure(data["arr_0"], data["arr_1"])))


if __name__ == "__main__":
  app.run(main)
