"""Features: TensorFlow's resize, pixel features, FeatureExtractor."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.evaluation.features import (
  FeatureExtractor,
  inception_features,
  pixel_features,
  tf1_resize,
)
from tests import forked, reference

SIZES = ("16x16_to_29x29", "32x24_to_40x50", "48x48_to_17x17")


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_resize_matches_reference(size):
  recorded = reference.load("tf1_resize")
  expected = recorded[f"{size}/resized"]
  found = tf1_resize(recorded[f"{size}/images"], expected.shape[1:3])
  assert found.dtype == jnp.float32
  # 1e-4 in the pixel range 0 … 255.
  reference.assert_matches("TensorFlow's resize", found, expected, 1e-4 / 255)


def test_resize_to_the_same_size_is_the_identity():
  images = noise(2, 9, 7, 3)
  np.testing.assert_array_equal(tf1_resize(images, (9, 7)), images)


def test_inception_refuses_grey_images():
  with pytest.raises(SettingError, match=r"\(8, 8, 1\): Inception takes RGB"):
    inception_features({}, noise(1, 8, 8, 1))


def test_pixel_features_of_small_images_are_their_pixels():
  images = noise(3, 8, 6, 1)
  found = pixel_features(None, images)["pixels"]
  np.testing.assert_allclose(found, images.reshape(3, -1) / 255, rtol=1e-6)


def test_pixel_features_of_large_images_are_8x8_averages():
  blocks = noise(2, 8, 8, 3)
  images = blocks.repeat(4, axis=1).repeat(4, axis=2)
  found = pixel_features(None, images)["pixels"]
  assert found.shape == (2, 192)
  np.testing.assert_allclose(
    found.mean(axis=1), images.mean((1, 2, 3)) / 255, rtol=1e-2
  )


@pytest.mark.parametrize("count", [1, 3, 4])
def test_partial_batch_gives_one_feature_per_image(count):
  images = noise(count, 5, 5, 3)

  def means(scale, batch):
    return {"mean": scale * batch.astype(jnp.float32).mean(axis=(1, 2))}

  found = FeatureExtractor(means, jnp.float32(2), batch_size=4)(images)["mean"]
  np.testing.assert_allclose(found, 2 * images.mean(axis=(1, 2)), rtol=1e-6)


def test_batch_size_zero_is_refused():
  with pytest.raises(SettingError, match="batch_size = 0"):
    FeatureExtractor(pixel_features, batch_size=0)


def extract_on_eight_devices(images, path):
  extract = FeatureExtractor(pixel_features, batch_size=12)
  assert extract.batch_size == 16
  full = extract(images)["pixels"]
  assert len(full.sharding.device_set) == jax.device_count() == 8
  np.save(path, [full[:13], extract(images[:13])["pixels"]])


def test_eight_devices_give_the_features_of_one_device(tmp_path):
  images, path = noise(16, 16, 16, 3), tmp_path / "features.npy"
  process = forked.Forked(extract_on_eight_devices, images, path, num_devices=8)
  assert process.end() == 0, process.err
  one = FeatureExtractor(pixel_features)(images[:13])["pixels"]
  for found in np.load(path):
    np.testing.assert_allclose(found, one, rtol=1e-5)
