"""Encoded images (PNG, JPEG, …) from folders, tar files or TFDS, centre-cropped."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mdt_jax.data import transforms
from mdt_jax.data.examples import SourceArguments
from mdt_jax.data.files import Files, FileSource, open_files
from mdt_jax.errors import check_choice


class ImageSource(FileSource):
  """Images with ADM's centre crop.

  "image" is uint8 (image_size, image_size, channels), converted to grey or RGB. An
  animation gives its first frame.

  Args:
    files: the encoded images.
    image_size: height and width of the crop in pixels.
    channels: 1 or 3.
    max_unreadable: how many images may be unreadable.

  Raises:
    SettingError: `channels` is neither 1 nor 3.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    check_choice("config.model.in_channels", channels, (1, 3))
    super().__init__(files, image_size, channels, max_unreadable)

  def decode(self, data: bytes) -> UInt8[np.ndarray, "H W C"]:
    size, _, channels = self.image_shape
    try:
      opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # Its message shows the BytesIO, not the file.
      raise UnidentifiedImageError("no image of a known kind") from None
    with opened as file:
      file.load()  # Image.open reads the header only; this finds truncated files.
      image: Image.Image = file
      if image.mode.startswith("I"):  # 16 bits, which `convert` would clip to 8.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
      image = image.convert("L" if channels == 1 else "RGB")
    smaller, larger = sorted(image.size)
    most = Image.MAX_IMAGE_PIXELS  # the crop enlarges the smaller side to `size`
    if most is not None and larger * size**2 / smaller > most:
      raise ValueError(f"{image.size} pixels are too long and narrow to be cropped")
    cropped = np.array(transforms.center_crop(image, size))
    return cropped.reshape(self.image_shape)


def open_images(arguments: SourceArguments) -> ImageSource:
  """Opens a folder of images, tar files or a TFDS set, see `files.open_files`."""
  return ImageSource(
    open_files(arguments.path, arguments.split),
    arguments.image_size,
    arguments.channels,
    arguments.max_unreadable,
  )
