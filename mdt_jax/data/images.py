"""Image files (PNG, JPEG, …) from folders, tar files or TFDS, centre-cropped."""

from __future__ import annotations

import io
import os

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError

from mdt_jax.data import transforms
from mdt_jax.data.examples import SourceArguments
from mdt_jax.data.files import Files, FileSource, open_files
from mdt_jax.errors import check_choice
from mdt_jax.logs import logger, printable
from mdt_jax.sizes import Size

# Pillow's names of the formats of `files.IMAGE_EXTENSIONS`. Other decoders stay off:
# whatever a file is called, Pillow would run Ghostscript on PostScript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
LOOKED_AT = 8  # images whose largest value is looked at, evenly spaced


def open_image(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
  """Opens and decodes an image file.

  Args:
    file: path or content of a file of one of `FORMATS`.

  Raises:
    UnidentifiedImageError: the file is not an image of these formats.
    Exception: the file is damaged. Pillow's decoders raise nearly every type.
  """
  try:
    image = Image.open(file, formats=FORMATS)
  except UnidentifiedImageError:  # Pillow's message may show the BytesIO object
    raise UnidentifiedImageError(f"not one of {', '.join(FORMATS)}") from None
  image.load()  # Image.open reads only the header; load finds truncated files
  return image


class ImageSource(FileSource):
  """A source of images with ADM's centre crop.

  The entry "image" of an example is uint8 (H, W, channels). Images are
  converted to grey or RGB. Of an animation, the first frame is used.

  Args:
    files: the image files.
    image_size: height and width of the crop in pixels, see `mdt_jax.sizes`.
    channels: 1 (grey) or 3 (RGB).
    max_unreadable: largest accepted number of unreadable images.
    image_bits: bits of the values in images of more than 8 bits; 2**image_bits - 1
      becomes 255. An image with a larger value counts as unreadable.

  Raises:
    SettingError: `channels` is neither 1 nor 3.
  """

  def __init__(
    self,
    files: Files,
    image_size: Size,
    channels: int,
    max_unreadable: int,
    image_bits: int = 16,
  ):
    check_choice("config.model.in_channels", channels, (1, 3))
    super().__init__(files, image_size, channels, max_unreadable)
    self._white = 2**image_bits - 1
    self._warn_if_dark()

  def decode(self, data: bytes) -> UInt8[np.ndarray, "H W C"]:
    """Decodes, converts and crops an image file; raises if that fails."""
    height, width, channels = self.image_shape
    with open_image(io.BytesIO(data)) as file:
      image: Image.Image = file
      if image.mode == "F":
        raise ValueError("holds floats; config.data.source=arrays reads .npy files")
      if image.mode.startswith("I"):  # 16 bits, which `convert` would clip at 255
        image = Image.fromarray(self._to_8_bits(np.asarray(image, np.int64)))
      image = image.convert("L" if channels == 1 else "RGB")
    most = Image.MAX_IMAGE_PIXELS
    # The crop may enlarge a small side to its target, and the other side with it.
    scale = max(height / image.height, width / image.width)
    if most is not None and image.height * image.width * scale**2 > most:
      raise ValueError(f"image of {image.size} pixels is too long and narrow to crop")
    cropped = np.array(transforms.center_crop(image, (height, width)))
    return cropped.reshape(self.image_shape)

  def _to_8_bits(self, values: Int64[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Scales values of `image_bits` bits; raises ValueError for others."""
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > self._white:
      raise ValueError(
        f"holds {least if least < 0 else most}; config.data.image_bits allows "
        f"0 … {self._white}"
      )
    return (values * 255 // self._white).astype(np.uint8)

  def _warn_if_dark(self) -> None:
    """Warns if images of more than 8 bits use a small part of their range."""
    most = 0
    places = np.linspace(0, len(self) - 1, min(len(self), LOOKED_AT)).round()
    for index in places.astype(int).tolist():
      try:
        with Image.open(io.BytesIO(self.files.read(index)[0]), formats=FORMATS) as file:
          if file.mode.startswith("I"):  # known from the header
            most = max(most, int(np.asarray(file).max()))
      except Exception:  # `__getitem__` handles unreadable images.
        continue
    if 0 < most <= self._white // 16:
      logger.warning(
        "Images of more than 8 bits in %s look black: the largest value in %d images "
        "is %s of %s. If they hold %d bits, set config.data.image_bits=%d "
        "(--image_bits of mdt_jax.encode)",
        printable(self._path),
        len(places),
        f"{most:,}",
        f"{self._white:,}",
        *[max(8, most.bit_length())] * 2,
      )


def open_images(arguments: SourceArguments) -> ImageSource:
  """Opens a folder of images, tar files or a TFDS data set; see `files.open_files`."""
  return ImageSource(
    open_files(arguments.path, arguments.split),
    arguments.image_size,
    arguments.channels,
    arguments.max_unreadable,
    arguments.image_bits,
  )
