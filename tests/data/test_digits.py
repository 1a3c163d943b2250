"""DigitsSource: the bundled digits."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.data.digits import DigitsSource
from tests.data.folders import labels


@pytest.fixture(scope="module")
def digits():
  return DigitsSource()


def test_digits_hold_1797_images(digits):
  assert len(digits) == 1797


def test_digits_have_ten_classes(digits):
  assert set(labels(digits)) == set(range(digits.num_classes)) == set(range(10))


def test_digit_is_uint8_of_the_declared_shape(digits):
  image = digits[0]["image"]
  assert (
    (image.shape, image.dtype)
    == (digits.image_shape, np.uint8)
    == (
      (8, 8, 1),
      np.uint8,
    )
  )


def test_digit_label_is_int32(digits):
  assert digits[0]["label"].dtype == np.int32


def test_17_grey_levels_are_scaled_to_0_to_255(digits):
  found = np.unique([example["image"] for example in digits])
  np.testing.assert_array_equal(found, [round(v * 255 / 16) for v in range(17)])
