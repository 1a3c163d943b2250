"""Measures the cost of scores: python -m benchmarks.evaluation --what=frechet

The benchmark prints the time in seconds and the peak memory of the whole process.

--what=frechet: the Frechet distance of two sets of 50,000 x 2,048 features.
--what=precision_recall: precision and recall of 10,000 real and 50,000 generated
  features.
--what=evaluate: the five scores of ADM, as mdt_jax.evaluate computes them, for 50,000
  samples of 256x256 against 10,000 images. A random projection replaces Inception, so
  the cost of Inception is not included.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mdt_jax.evaluation import metrics
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_streams import NpzImages
from mdt_jax.evaluation.references import read_reference
from mdt_jax.evaluation.registry import inception_metrics
from mdt_jax.models.inception import NUM_CLASSES, NUM_FEATURES, NUM_SPATIAL

WHAT = flags.DEFINE_enum("what", None, ["frechet", "precision_recall", "evaluate"], "")
NUM_IMAGES = flags.DEFINE_integer("num_images", 50_000, "Generated images.")
NUM_REAL = flags.DEFINE_integer("num_real", 10_000, "Real images.")
flags.mark_flag_as_required("what")


def frechet() -> dict[str, Any]:
  """Times the Frechet distance of two sets of features."""
  rng = np.random.default_rng(0)
  first, second = (_features(rng, NUM_IMAGES.value) for _ in range(2))
  return _timed(lambda: metrics.frechet_distance(first, second))


def precision_recall() -> dict[str, Any]:
  """Times precision and recall of two sets of features."""
  rng = np.random.default_rng(0)
  real, generated = _features(rng, NUM_REAL.value), _features(rng, NUM_IMAGES.value)
  return _timed(lambda: metrics.precision_recall(real, generated))


def evaluate() -> dict[str, Any]:
  """Times the five scores of ADM on image files."""
  sizes = {"pool3": NUM_FEATURES, "spatial": NUM_SPATIAL, "logits": NUM_CLASSES}
  rng = np.random.default_rng(0)
  pixels = 16 * 16 * 3
  projections = {
    name: rng.standard_normal((pixels, size), np.float32) / pixels**0.5
    for name, size in sizes.items()
  }

  def features(params: Any, batch: jax.Array) -> dict[str, jax.Array]:
    x = batch[:, ::16, ::16].reshape(len(batch), pixels).astype(jnp.float32) / 255
    return {name: x @ matrix for name, matrix in params.items()}

  with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder) / name for name in ("real.npz", "generated.npz")]
    for path, count in zip(paths, (NUM_REAL.value, NUM_IMAGES.value), strict=True):
      _write_noise(path, count)
    extract = FeatureExtractor(features, projections)

    def run() -> dict[str, float]:
      names = inception_metrics()
      real = read_reference(paths[0], names, extract)
      return Evaluator(names, extract, real)(NpzImages(paths[1]))

    return _timed(run)


def _features(rng: np.random.Generator, count: int) -> np.ndarray:
  """Correlated random features; the correlations are the same in each call."""
  shape = (NUM_FEATURES, NUM_FEATURES)
  mixing = np.random.default_rng(1).standard_normal(shape, np.float32)
  mixing *= (np.arange(1, NUM_FEATURES + 1, dtype=np.float32) ** -0.7)[:, None]
  features = np.empty((count, NUM_FEATURES), np.float32)
  for start in range(0, count, 1000):
    part = features[start : start + 1000]
    part[:] = rng.standard_normal(part.shape, np.float32) @ mixing
  return features


def _write_noise(path: Path, count: int) -> None:
  """Writes an .npz of `count` random images of 256x256, one at a time."""
  rng = np.random.default_rng(0)
  shape = (256, 256, 3)
  with (
    zipfile.ZipFile(path, "w") as archive,
    archive.open("arr_0.npy", "w", force_zip64=True) as member,
  ):
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(member, header)
    for _ in range(count):
      member.write(rng.bytes(int(np.prod(shape))))


def _timed(run: Callable[[], Any]) -> dict[str, Any]:
  """Runs a function; returns seconds, peak memory of the process, and the result."""
  before = time.monotonic()
  value = run()
  seconds = time.monotonic() - before
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {"seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2), "value": value}


def main(argv: list[str]) -> None:
  del argv
  measured = {
    "frechet": frechet,
    "precision_recall": precision_recall,
    "evaluate": evaluate,
  }
  print(json.dumps(measured[WHAT.value]()))


if __name__ == "__main__":
  app.run(main)
