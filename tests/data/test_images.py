"""ImageSource: how images are decoded and which images are skipped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from mdt_jax.data.files import open_files
from mdt_jax.data.images import ImageSource, open_image
from mdt_jax.errors import SettingError
from tests.data.folders import SIZE, open_folder, values, write_image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_every_image_mode_gives_the_declared_shape(tmp_path, mode, channels):
  write_image(
    tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"), 9, (20, 11), mode=mode
  )
  source = open_folder(tmp_path, channels=channels)
  image = source[0]["image"]
  assert (image.shape, image.dtype) == ((SIZE, SIZE, channels), np.uint8)
  assert source.image_shape == image.shape


def test_16_bit_images_become_8_bit(tmp_path):
  values = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
  Image.fromarray(values).save(tmp_path / "x.png")
  image = open_folder(tmp_path, image_size=4, channels=1)[0]["image"]
  np.testing.assert_array_equal(image[0, :, 0], [0, 1, 127, 255])


def write_16_bits(path, *values):
  pixels = np.resize(np.array(values, np.uint16), (SIZE, SIZE))
  Image.fromarray(pixels).save(path)


def test_images_of_12_bits_are_warned_of(tmp_path, warnings):
  write_16_bits(tmp_path / "x.png", 0, 4095)
  assert open_folder(tmp_path)[0]["image"].max() == 15
  (line,) = warnings
  assert "4,095 of 65,535" in line and "config.data.image_bits=12" in line


@pytest.mark.parametrize("most", [4096, 65535])
def test_images_of_16_bits_are_not_warned_of(tmp_path, warnings, most):
  write_16_bits(tmp_path / "x.png", 0, most)
  write_16_bits(tmp_path / "y.png", 0, 7)
  open_folder(tmp_path)
  assert not warnings


def test_image_bits_sets_the_value_of_white(tmp_path, warnings):
  write_16_bits(tmp_path / "x.png", 0, 16, 2048, 4095)
  source = ImageSource(open_files(tmp_path), SIZE, 1, 0, image_bits=12)
  assert source[0]["image"][0, :4, 0].tolist() == [0, 0, 127, 255]
  assert not warnings


def test_value_beyond_image_bits_is_unreadable(tmp_path):
  write_16_bits(tmp_path / "x.png", 0, 4096)
  source = ImageSource(open_files(tmp_path), SIZE, 1, 0, image_bits=12)
  with pytest.raises(SettingError, match=r"holds 4096; config.data.image_bits allows"):
    source[0]


def test_image_of_floats_is_unreadable(tmp_path):
  Image.fromarray(np.zeros((SIZE, SIZE), np.float32)).save(tmp_path / "x.tif")
  with pytest.raises(SettingError, match="holds floats"):
    open_folder(tmp_path, max_unreadable=0)[0]


def test_palette_image_is_converted_to_rgb(tmp_path):
  Image.new("RGB", (SIZE, SIZE), (200, 10, 90)).quantize(4).save(tmp_path / "x.png")
  assert open_folder(tmp_path)[0]["image"][3, 4].tolist() == [200, 10, 90]


def test_animation_gives_its_first_frame(tmp_path):
  frames = [Image.new("L", (SIZE, SIZE), value) for value in (40, 80, 120)]
  frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
  assert values(open_folder(tmp_path, channels=1)) == [40]


@pytest.mark.parametrize("size", [(40, 1), (1, 40), (1, 1)])
def test_image_one_pixel_high_or_wide_is_accepted(tmp_path, size):
  write_image(tmp_path / "x.png", 5, size)
  assert (open_folder(tmp_path)[0]["image"] == 5).all()


def test_image_with_an_extreme_aspect_ratio_is_skipped(three, monkeypatch):
  """Resizing its smaller side to `image_size` would make the longer side too large."""
  write_image(three / "2.png", 2, (5000, 1))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
  assert values(open_folder(three)) == [1, 3, 3]


def test_image_is_center_cropped(tmp_path):
  pixels = np.arange(SIZE * 12, dtype=np.uint8).reshape(SIZE, 12)
  Image.fromarray(pixels).save(tmp_path / "x.png")
  image = open_folder(tmp_path, channels=1)[0]["image"]
  np.testing.assert_array_equal(image[..., 0], pixels[:, 2:10])


def test_image_is_cropped_to_height_and_width(tmp_path):
  pixels = np.arange(6 * 12, dtype=np.uint8).reshape(6, 12)
  Image.fromarray(pixels).save(tmp_path / "x.png")
  source = open_folder(tmp_path, image_size=(6, 9), channels=1)
  assert source.image_shape == (6, 9, 1)
  np.testing.assert_array_equal(source[0]["image"][..., 0], pixels[:, 1:10])


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp"])
def test_truncated_image_is_skipped(three, extension):
  path = three / f"0.{extension}"
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
  Image.fromarray(noise).save(path)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert values(open_folder(three)) == [1, 1, 2, 3]


def test_decompression_bomb_is_skipped(three, monkeypatch):
  write_image(three / "2.png", 2, (100, 100))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  assert values(open_folder(three)) == [1, 3, 3]


@pytest.mark.parametrize("channels", [2, 4])
def test_unsupported_number_of_channels_is_refused(three, channels):
  with pytest.raises(
    SettingError, match=rf"^config.model.in_channels = {channels}: accepted are 1, 3"
  ):
    open_folder(three, channels=channels)


def test_postscript_in_a_file_named_png_is_not_run(tmp_path, monkeypatch):
  from PIL import EpsImagePlugin

  def run(*args, **kwargs):
    raise AssertionError("Ghostscript was started")

  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
  path = tmp_path / "x.png"
  path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
  with pytest.raises(UnidentifiedImageError, match="PNG"):
    open_image(path)
