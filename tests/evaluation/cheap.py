"""Small images, and cheap features with the names of the Inception features."""

from __future__ import annotations

import functools

import numpy as np

from mdt_jax.evaluation.features import FeatureExtractor, pixel_features
from mdt_jax.evaluation.image_streams import NpzImages
from mdt_jax.evaluation.registry import METRICS
from mdt_jax.evaluation.scores import summarize

# Scores of images in files; the others ask the data of a run.
OF_FILES = tuple(
  name
  for name, metric in METRICS.items()
  if not (metric.check_data or metric.needs_conditions)
)


def features(params, images):
  pixels = pixel_features(params, images)
  x = pixels["pixels"].reshape(len(images), -1, 3)
  return pixels | {"pool3": x.mean(1), "spatial": x[:, 0], "logits": 9 * x.std(1)}


@functools.cache
def extractor():
  return FeatureExtractor(features, batch_size=8)


def photos(count, seed):
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 3
  images = rng.integers(0, 150, (count, 4, 4, 3)) + 30 * labels[:, None, None, None]
  return images.astype(np.uint8), labels


def summary(path, names=OF_FILES):
  return summarize(NpzImages(path), extractor(), names)
