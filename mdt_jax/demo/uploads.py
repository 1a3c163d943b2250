"""Checks pictures that a browser sends, and fits them to a network."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from mdt_jax.data.images import FORMATS, open_image
from mdt_jax.data.transforms import center_crop
from mdt_jax.errors import SettingError, one_line
from mdt_jax.sizes import Size, height_width

MAX_BYTES = 10 * 2**20  # of an uploaded file
MAX_PIXELS = 40_000_000  # of an uploaded picture; a decoded pixel takes 1 to 4 bytes
MAX_RATIO = 20  # of the sides of an uploaded picture
MARKED_FROM = 96  # smallest brushed share of a pixel, of 255, that marks the pixel
PREFIX = "data:image/png;base64,"


def read_picture(
  setting: str, data: bytes, size: Size, channels: int
) -> UInt8[np.ndarray, "H W C"]:
  """Reads an uploaded picture of any size, and crops its centre to a network's size.

  The pixels are decoded only after the header is checked, so a small file that decodes
  to a huge picture is refused.

  Args:
    setting: name of the upload in errors.
    data: content of a file of one of `data.images.FORMATS`.
    size: height and width of the result, see `mdt_jax.sizes`.
    channels: 1 (grey) or 3 (RGB).

  Returns:
    (H, W, channels) uint8.

  Raises:
    SettingError: the file is empty or too large, is no such picture, is damaged, has
      too many pixels, or is too long and narrow to crop.
  """
  if not 0 < len(data) <= MAX_BYTES:
    accepted = f"must hold 1 byte to {MAX_BYTES // 2**20} MB"
    raise SettingError(setting, f"{len(data):,} bytes", accepted)
  image = _decode(setting, data)
  shape = height_width(size)
  cropped = np.asarray(center_crop(_flat(image, channels), shape))
  return cropped.reshape(*shape, channels)


def read_mask(setting: str, data: bytes, size: Size) -> Bool[np.ndarray, "H W"]:
  """Reads the brush strokes of a canvas: a picture that is opaque where it is brushed.

  Args:
    setting: name of the mask in errors.
    data: content of a picture file with transparency, of the size of the network's
      pictures.
    size: height and width, see `mdt_jax.sizes`.

  Returns:
    (H, W) bool, True where the picture is brushed.

  Raises:
    SettingError: the file cannot be read, or has another size.
  """
  image = _decode(setting, data)
  height, width = height_width(size)
  if (image.height, image.width) != (height, width):
    found = f"{image.width}x{image.height} pixels"
    raise SettingError(setting, found, f"must have {width}x{height} pixels")
  return np.asarray(image.convert("RGBA"))[..., 3] >= MARKED_FROM


def from_data_url(setting: str, url: object) -> bytes:
  """Returns the bytes of a data URL of a PNG; b"" for an empty one.

  Raises:
    SettingError: it is no such URL, or is too long.
  """
  if url is None or url == "":
    return b""
  if not isinstance(url, str) or not url.startswith(PREFIX):
    raise SettingError(setting, type(url).__name__, "must be a data URL of a PNG")
  if len(url) > MAX_BYTES * 4 // 3:
    raise SettingError(setting, f"{len(url):,} characters", "is too long")
  try:
    return base64.b64decode(url[len(PREFIX) :], validate=True)
  except (binascii.Error, ValueError):
    raise SettingError(setting, "data URL", "is damaged") from None


def to_data_url(image: Image.Image) -> str:
  """Returns a data URL of a picture as PNG."""
  content = io.BytesIO()
  image.save(content, "PNG")
  return PREFIX + base64.b64encode(content.getvalue()).decode()


def _decode(setting: str, data: bytes) -> Image.Image:
  """Decodes a picture file, after a look at its header."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(data), formats=FORMATS) as header:
        width, height = header.size
  except Image.DecompressionBombError:
    raise _too_large(setting, "far more") from None
  except Exception as error:  # Pillow's decoders raise nearly every type
    raise _not_a_picture(setting, error) from None
  if width * height > MAX_PIXELS:
    raise _too_large(setting, f"{width}x{height}")
  if max(width, height) > MAX_RATIO * min(width, height):
    accepted = f"one side may be {MAX_RATIO} times as long as the other"
    raise SettingError(setting, f"{width}x{height} pixels", accepted)
  try:
    return open_image(io.BytesIO(data))
  except Exception as error:
    raise _not_a_picture(setting, error) from None


def _too_large(setting: str, pixels: str) -> SettingError:
  return SettingError(
    setting, f"{pixels} pixels", f"must have at most {MAX_PIXELS // 10**6} megapixels"
  )


def _not_a_picture(setting: str, error: Exception) -> SettingError:
  text = one_line(error, 80).replace("<_io.BytesIO object", "<file")
  accepted = f"cannot be read as a picture; accepted are {', '.join(FORMATS)}"
  return SettingError(setting, text, accepted)


def _flat(image: Image.Image, channels: int) -> Image.Image:
  """Turns a picture upright and to grey or RGB, transparency over white."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I") or image.mode == "F":  # 16 bits or floats
    values = np.asarray(image, np.float64)
    low, high = (0, 65535) if values.max() > 255 else (0, 255)
    scaled = (values - low) * (255 / (high - low))
    image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
  if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
    over = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
  return image.convert("L" if channels == 1 else "RGB")
