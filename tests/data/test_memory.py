"""MemorySource: examples from arrays in memory."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.data.loader import create_loader
from mdt_jax.data.memory import MemorySource
from mdt_jax.errors import SettingError
from tests.data.folders import labels, values

PIXELS = np.arange(3 * 4 * 5 * 2, dtype=np.uint8).reshape(3, 4, 5, 2)
LATENTS = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)


def test_source_returns_the_given_images_and_labels():
  source = MemorySource(PIXELS, [2, 0, 1])
  assert (len(source), source.num_classes, source.image_shape) == (3, 3, (4, 5, 2))
  np.testing.assert_array_equal(source[1]["image"], PIXELS[1])
  assert source[1]["image"].dtype == np.uint8
  assert labels(source) == [2, 0, 1]
  assert source[0]["label"].dtype == np.int32


def test_images_without_labels_form_one_class():
  source = MemorySource(PIXELS)
  assert (labels(source), source.num_classes) == ([0, 0, 0], 1)


def test_num_classes_may_exceed_the_largest_label():
  assert MemorySource(PIXELS, [0, 1, 1], num_classes=10).num_classes == 10


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_are_not_rescaled(dtype):
  source = MemorySource(LATENTS.astype(dtype))
  assert not source.pixels
  assert source[2]["image"].dtype == np.float32
  np.testing.assert_array_equal(
    source[2]["image"], LATENTS.astype(dtype)[2].astype(np.float32)
  )


def test_loader_scales_pixels_but_not_floats():
  def batch(source):
    loader = create_loader(source, seed=0, batch_size=3, flip=False, num_threads=0)
    return np.sort(next(loader)["image"].ravel())

  expected = np.sort(PIXELS.ravel().astype(np.float32) / np.float32(127.5) - 1)
  np.testing.assert_array_equal(batch(MemorySource(PIXELS)), expected)
  np.testing.assert_array_equal(batch(MemorySource(LATENTS)), np.sort(LATENTS.ravel()))


def test_iteration_ends_after_the_last_example():
  assert values(MemorySource(PIXELS)) == [0, 40, 80]


NOT_FINITE = np.array([1, np.nan, 1], np.float32).reshape(3, 1, 1, 1)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((PIXELS[0],), r"^images = \(4, 5, 2\): .*\(N, H, W, C\)"),
    ((PIXELS[:0],), r"^images = \(0, 4, 5, 2\): .* at least one image"),
    ((PIXELS.astype(int),), "^images = 'int64': must be uint8"),
    ((NOT_FINITE,), "^images = 'float32': must be finite"),
    ((np.full((1, 1, 1, 1), 1e300),), "^images = 'float64': must be finite"),
    ((PIXELS, [0, 1]), r"^labels = \(2,\): .*\(3,\)"),
    ((PIXELS, [[0], [1], [2]]), r"^labels = \(3, 1\): .*\(3,\)"),
    ((PIXELS, [0.0, 1.0, 2.0]), "^labels = 'float64': must be integers"),
    ((PIXELS, [0, -1, 2]), "^labels = -1: must be at least 0"),
    ((PIXELS, [0, 2**31, 2]), "^labels = 2147483648: must be below"),
    ((PIXELS, [0, 1, 2], 2), "^num_classes = 2: must be at least 3"),
  ],
)
def test_error_names_the_invalid_argument(arguments, message):
  with pytest.raises(SettingError, match=message) as error:
    MemorySource(*arguments)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("arrays", "value", "accepted"),
  [
    ([1, 2], "list", "must be a dict"),
    ({3: np.zeros(2)}, 3, "must be named by texts"),
    ({"label": np.zeros(2)}, "label", "must be named by texts other than"),
    ({"clip": np.zeros(3)}, "clip", "must have 2 rows"),
    ({"clip": np.float32(3)}, "clip", "must have 2 rows"),
    ({"clip": [None, None]}, "clip", "must be an array of numbers"),
    ({"clip": [[1], [1, 2]]}, "clip", "must be an array of numbers"),
    ({"caption": np.arange(2)}, "caption", "must be an array of texts"),
  ],
)
def test_arrays_that_do_not_fit_are_named(arrays, value, accepted):
  images = np.zeros((2, 4, 4, 1), np.uint8)
  with pytest.raises(SettingError, match=accepted) as error:
    MemorySource(images, [0, 1], arrays=arrays)
  assert (error.value.setting, error.value.value) == ("arrays", value)


def test_texts_of_pandas_are_captions():
  images = np.zeros((2, 4, 4, 1), np.uint8)
  texts = np.array(["a cat", "a dog"], dtype=object)
  assert (
    MemorySource(images, [0, 1], arrays={"caption": texts})[1]["caption"] == "a dog"
  )
