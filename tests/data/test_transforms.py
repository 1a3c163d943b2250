"""Transforms of images and latents: crop, flip, scale."""

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import transforms


def _ramp(height, width):
  """A horizontal ramp from 0 to 255, float64."""
  return np.tile(np.linspace(0, 255, width), (height, 1))


def test_image_of_the_right_size_is_unchanged():
  pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
  np.testing.assert_array_equal(
    np.array(transforms.center_crop(Image.fromarray(pixels), 8)), pixels
  )


@pytest.mark.parametrize(
  ("shape", "rows", "columns"),
  [((8, 13), slice(0, 8), slice(2, 10)), ((11, 8), slice(1, 9), slice(0, 8))],
)
def test_crop_starts_at_half_the_surplus_rounded_down(shape, rows, columns):
  pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
  np.testing.assert_array_equal(
    np.array(transforms.center_crop(Image.fromarray(pixels), 8)), pixels[rows, columns]
  )


def test_image_of_twice_the_size_is_averaged_over_2x2_blocks():
  blocks = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
  offsets = np.tile(np.array([[-2, 2], [4, -4]]), (4, 4))  # Zero mean in each block.
  pixels = (np.kron(blocks + 20, np.ones((2, 2))) + offsets).astype(np.uint8)
  np.testing.assert_array_equal(
    np.array(transforms.center_crop(Image.fromarray(pixels), 4)), blocks + 20
  )


def test_image_below_twice_the_size_is_not_halved():
  # Halving 15 to 7 and enlarging to 8 would lose the single bright column.
  pixels = np.zeros((15, 15), np.uint8)
  pixels[:, 7] = 255
  expected = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    np.array(transforms.center_crop(Image.fromarray(pixels), 8)), np.array(expected)
  )


def test_large_image_is_halved_until_below_twice_the_size():
  # 50 x 41 is halved twice, to 12 x 10 (each side rounded down), and then resized.
  pixels = np.random.default_rng(0).integers(0, 256, (41, 50), dtype=np.uint8)
  means = pixels
  for height, width in ((20, 25), (10, 12)):
    means = np.array(
      Image.fromarray(means).resize((width, height), Image.Resampling.BOX)
    )
  scaled = Image.fromarray(means).resize((10, 8), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(
    np.array(transforms.center_crop(Image.fromarray(pixels), 8)),
    np.array(scaled)[:, 1:9],
  )


def test_small_image_is_enlarged_without_overshoot_or_shift():
  small = Image.fromarray(_ramp(5, 5).round().astype(np.uint8))
  enlarged = np.array(transforms.center_crop(small, 20)).astype(float)
  # Pixel centres of the large image on the axis of the small one. The ramp rises by
  # 63.75 for each pixel of the small image.
  expected = ((np.arange(20) + 0.5) / 4 - 0.5) * 63.75
  np.testing.assert_allclose(
    enlarged[:, 6:14], np.tile(expected[6:14], (20, 1)), atol=1
  )


def _released_crop(image, size):
  """The crop of the released data loader, step by step.

  1. While the smaller side is at least twice `size`, halve both sides (rounded down)
     with a box filter.
  2. Scale by size / smaller side (rounded) with a bicubic filter.
  3. Cut out `size` rows and columns, starting at half the surplus, rounded down.
  """
  while min(image.size) >= 2 * size:
    image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
  ratio = size / min(image.size)
  new_size = [round(side * ratio) for side in image.size]
  pixels = np.array(image.resize(new_size, Image.Resampling.BICUBIC))
  top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
  return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("seed", range(60))
def test_crop_matches_the_released_code_byte_for_byte(seed):
  rng = np.random.default_rng(seed)
  width, height = rng.integers(1, 200, 2) * 2 + 1
  size = int(rng.choice([16, 24, 32, 64]))
  pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
  image = Image.fromarray(pixels)
  cropped = np.array(transforms.center_crop(image, size))
  assert cropped.tobytes() == _released_crop(image, size).tobytes()


def _covering_crop(image, height, width):
  """The same steps for a rectangle: one scale, so that both sides are covered."""
  while image.height >= 2 * height and image.width >= 2 * width:
    image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
  if image.height * width <= image.width * height:  # the height is the scarce side
    new_size = (round(image.width * height / image.height), height)
  else:
    new_size = (width, round(image.height * width / image.width))
  pixels = np.array(image.resize(new_size, Image.Resampling.BICUBIC))
  top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
  return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("seed", range(40))
def test_crop_to_a_rectangle_covers_it_with_one_scale(seed):
  rng = np.random.default_rng(seed)
  height, width = rng.integers(1, 200, 2)
  target = tuple(int(side) for side in rng.integers(3, 70, 2))
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
  cropped = np.array(transforms.center_crop(image, target))
  assert cropped.shape == (*target, 3)
  np.testing.assert_array_equal(cropped, _covering_crop(image, *target))


@pytest.mark.parametrize("seed", range(5))
def test_crop_of_the_transposed_image_is_transposed(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (45, 31 + seed), np.uint8)
  crop, transposed = (
    np.array(transforms.center_crop(Image.fromarray(p), size)).astype(int)
    for p, size in ((pixels, (16, 10)), (pixels.T, (10, 16)))
  )
  # Pillow resizes rows before columns, and rounds in between.
  assert np.abs(crop - transposed.T).max() <= 3


def example_of_latents():
  return {"views": np.arange(2 * 2 * 12).reshape(2, 2, 2, 2, 3), "label": 1}


def test_flip_selects_the_latents_of_the_image_or_its_mirror_image():
  example = example_of_latents()
  found = [
    transforms.random_flip(example, np.random.default_rng(seed)) for seed in range(40)
  ]
  chosen = [int((f["moments"] == example["views"][1]).all()) for f in found]
  assert 10 < sum(chosen) < 30
  assert all(
    (f["moments"] == example["views"][c]).all()
    for f, c in zip(found, chosen, strict=True)
  )
  assert all(set(f) == {"moments", "label"} for f in found)


def test_without_draws_selects_the_unflipped_latents():
  example = example_of_latents()
  found = transforms.without_draws(example)
  np.testing.assert_array_equal(found["moments"], example["views"][0])


def test_crop_keeps_the_image_mode():
  assert transforms.center_crop(Image.new("RGB", (30, 20)), 8).mode == "RGB"


def test_to_float_scales_pixels_to_minus_one_to_one():
  scaled = transforms.to_float(np.array([0, 51, 255], np.uint8))
  np.testing.assert_allclose(scaled, [-1, -0.6, 1], atol=1e-7)


def test_to_float_returns_float32():
  assert transforms.to_float(np.zeros((2, 2), np.uint8)).dtype == np.float32


def test_random_flip_mirrors_left_to_right_or_does_nothing():
  image = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
  flipped = {
    transforms.random_flip({"image": image}, np.random.default_rng(seed))[
      "image"
    ].tobytes()
    for seed in range(20)
  }
  assert flipped == {image.tobytes(), image[:, ::-1].tobytes()}


def test_half_of_all_images_are_flipped():
  image = np.arange(2, dtype=np.uint8).reshape(1, 2, 1)
  rng = np.random.default_rng(0)
  flips = [
    transforms.random_flip({"image": image}, rng)["image"][0, 0, 0] for _ in range(1000)
  ]
  assert abs(np.mean(flips) - 0.5) < 0.05


def test_random_flip_leaves_float_images_unchanged():
  latent = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
  for seed in range(20):
    example = transforms.random_flip({"image": latent}, np.random.default_rng(seed))
    np.testing.assert_array_equal(example["image"], latent)
