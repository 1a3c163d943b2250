"""Reading of input images and masks."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mdt_jax.errors import SettingError
from mdt_jax.sampling import inpainting

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
HALF = np.zeros((8, 8), bool)
HALF[:, 4:] = True


def test_image_is_read_from_a_file_pil_image_or_array(tmp_path):
  picture = Image.fromarray(PIXELS)
  picture.save(tmp_path / "image.png")
  for image in (tmp_path / "image.png", picture, PIXELS):
    np.testing.assert_array_equal(inpainting.read_image("image", image, 8, 3), PIXELS)


def test_image_and_mask_are_read_from_a_bucket(bucket, tmp_path):
  for name, pixels in (("image.png", PIXELS), ("mask.png", np.uint8(255) * HALF)):
    Image.fromarray(pixels).save(tmp_path / name)
    epath.Path(f"{bucket}/{name}").write_bytes((tmp_path / name).read_bytes())
  image = inpainting.read_image("image", f"{bucket}/image.png", 8, 3)
  np.testing.assert_array_equal(image, PIXELS)
  mask = inpainting.read_mask("mask", epath.Path(f"{bucket}/mask.png"), 8)
  np.testing.assert_array_equal(mask, HALF)


@pytest.mark.parametrize(
  ("name", "message"),
  [("missing.png", "must be a file"), ("text.png", "cannot be read as an image")],
)
def test_error_names_an_object_that_is_no_image(bucket, name, message):
  epath.Path(f"{bucket}/text.png").write_bytes(b"no image")
  with pytest.raises(SettingError) as error:
    inpainting.read_image("image", f"{bucket}/{name}", 8, 3)
  assert str(error.value).startswith(f"image = '{bucket}/{name}': {message}")


def test_grey_image_has_one_channel():
  picture = Image.fromarray(PIXELS[..., 0])
  for image in (picture, PIXELS[..., 0]):
    pixels = inpainting.read_image("image", image, 8, 1)
    np.testing.assert_array_equal(pixels, PIXELS[..., :1])


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (Image.new("RGBA", (8, 8)), "must be RGB, is RGB with transparency"),
    (Image.new("L", (8, 8)), "must be RGB, is grey"),
    (Image.new("RGB", (9, 8)), "image = '8x9x3': must have the model's size, 8x8x3"),
    (PIXELS[..., :1], "image = '8x8x1': must have the model's size, 8x8x3"),
    (PIXELS / 255, "must be uint8"),
    ("nowhere.png", "image = 'nowhere.png': must be a file"),
    (__file__, "cannot be read as an image"),
    (7, "image = 'int': "),
  ],
)
def test_error_names_an_image_that_does_not_fit_the_model(image, message):
  with pytest.raises(SettingError) as error:
    inpainting.read_image("image", image, 8, 3)
  assert message in str(error.value)


def test_white_mask_pixels_are_hidden():
  picture = Image.fromarray(np.uint8(255) * HALF)
  for mask in (picture, picture.convert("1"), picture.convert("RGB"), HALF):
    np.testing.assert_array_equal(inpainting.read_mask("mask", mask, 8), HALF)


def test_images_and_masks_of_height_and_width_are_read_in_this_order():
  image, mask = PIXELS[:6], HALF[:6]
  read = inpainting.read_image("image", Image.fromarray(image), (6, 8), 3)
  np.testing.assert_array_equal(read, image)
  np.testing.assert_array_equal(inpainting.read_mask("mask", mask, (6, 8)), mask)
  with pytest.raises(SettingError, match=r"'6x8x3': must have .* size, 8x6x3"):
    inpainting.read_image("image", image, (8, 6), 3)
  with pytest.raises(SettingError, match=r"'6x8': must have .* image, 8x6"):
    inpainting.read_mask("mask", mask, (8, 6))
  tokens = inpainting.hidden_tokens(mask, 2)
  assert tokens.tolist() == [False, False, True, True] * 3


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    (HALF[:, :6], "mask = '8x6': must have the size of the image, 8x8"),
    (Image.new("L", (16, 16)), "mask = '16x16': must have the size of the image, 8x8"),
    (np.ones((8, 8), bool), "only white pixels"),
    (Image.new("L", (8, 8), 127), "no white pixel"),
    (HALF.astype(float), "mask = 'float64 array': must be bool or uint8"),
    (7, "mask = 'int': "),
    (None, "mask = None: must be given"),
  ],
)
def test_error_names_an_invalid_mask(mask, message):
  with pytest.raises(SettingError) as error:
    inpainting.read_mask("mask", mask, 8)
  assert message in str(error.value)


def test_latent_is_visible_when_all_its_pixels_are_visible():
  mask = np.zeros((8, 8), bool)
  mask[0, 3:] = True
  expected = [[False, True, True, True]] + [[False] * 4] * 3
  assert inpainting.downsample_mask("mask", mask, 2).tolist() == expected


def test_mask_that_hides_every_latent_is_refused():
  with pytest.raises(SettingError, match=r"^mask = .*2x2 pixels"):
    inpainting.downsample_mask("mask", np.eye(2, dtype=bool), 2)


def test_token_is_hidden_when_all_its_pixels_are_hidden():
  mask = HALF.copy()
  mask[0, 5] = False
  tokens = inpainting.hidden_tokens(mask, 2).reshape(4, 4)
  assert (
    tokens.tolist() == [[False, False, False, True]] + [[False, False, True, True]] * 3
  )
