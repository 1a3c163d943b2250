"""Uploads: what is read, how it is fitted, and what is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mdt_jax import SettingError
from mdt_jax.demo import uploads


def as_bytes(image, kind="PNG"):
  content = io.BytesIO()
  image.save(content, kind)
  return content.getvalue()


def chunk(name, data):
  body = name + data
  return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(width, height):
  """A small PNG file whose header claims a huge picture."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = zlib.compress(bytes(1000))
  parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture_of_any_size_is_fitted(kind, channels):
  image = Image.new("RGB", (37, 90), (200, 200, 200))
  pixels = uploads.read_picture("upload", as_bytes(image, kind), 8, channels)
  assert (pixels.shape, pixels.dtype) == ((8, 8, channels), np.uint8)
  assert np.abs(pixels.astype(int) - 200).max() <= 3


def test_picture_is_fitted_to_a_rectangle():
  image = Image.new("L", (16, 8))
  image.paste(255, (8, 0, 16, 8))
  pixels = uploads.read_picture("upload", as_bytes(image), (8, 16), 1)
  np.testing.assert_array_equal(pixels[..., 0], np.asarray(image))


@pytest.mark.parametrize(
  ("image", "level"),
  [
    (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 255),  # transparent: over white
    (Image.new("P", (8, 8), 0), 0),
    (Image.new("1", (8, 8), 1), 255),
    (Image.fromarray(np.full((8, 8), 65535, np.uint16)), 255),
  ],
)
def test_modes_become_grey_levels(image, level):
  pixels = uploads.read_picture("upload", as_bytes(image), 8, 1)
  assert (pixels == level).all()


@pytest.mark.parametrize(
  ("data", "part"),
  [
    (b"", "0 bytes"),
    (bytes(uploads.MAX_BYTES + 1), "bytes"),
    (b"hello, I am no picture", "not"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not"),
    (as_bytes(Image.new("RGB", (64, 64)))[:60], "truncated"),
    (bomb(50_000, 50_000), "far more pixels"),
    (bomb(10_000, 10_000), "10000x10000 pixels"),
    (as_bytes(Image.new("L", (2, 500))), "2x500 pixels"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused(data, part):
  with pytest.raises(SettingError) as caught:
    uploads.read_picture("upload", data, 8, 1)
  assert caught.value.setting == "upload"
  assert part in str(caught.value).lower() or part in str(caught.value)


def test_mask_marks_the_brushed_pixels():
  strokes = np.zeros((8, 8, 4), np.uint8)
  strokes[2:4, 5] = (239, 68, 68, 255)
  mask = uploads.read_mask("mask", as_bytes(Image.fromarray(strokes)), 8)
  np.testing.assert_array_equal(mask, strokes[..., 3] > 0)


def test_mask_of_another_size_is_refused():
  with pytest.raises(SettingError) as caught:
    uploads.read_mask("mask", as_bytes(Image.new("RGBA", (9, 8))), 8)
  assert caught.value.setting == "mask"


def test_data_urls_are_read_and_written():
  image = Image.new("L", (3, 2), 7)
  data = uploads.from_data_url("mask", uploads.to_data_url(image))
  np.testing.assert_array_equal(Image.open(io.BytesIO(data)), image)
  assert uploads.from_data_url("mask", None) == b""


@pytest.mark.parametrize(
  "url",
  [
    3,
    {"a": 1},
    "https://example.org/x.png",
    "file:///etc/passwd",
    "data:text/html;base64,AAAA",
    uploads.PREFIX + "%%%%",
    uploads.PREFIX + base64.b64encode(bytes(12 * 2**20)).decode(),
  ],
  ids=lambda url: str(url)[:20],
)
def test_other_data_urls_are_refused(url):
  with pytest.raises(SettingError) as caught:
    uploads.from_data_url("mask", url)
  assert caught.value.setting == "mask"
