"""Reads and checks the images and masks of inpainting and editing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from mdt_jax.data.images import open_image
from mdt_jax.errors import SettingError
from mdt_jax.paths import input_file
from mdt_jax.sizes import Size, describe_size, height_width

# A PIL image, an array (H, W) or (H, W, C), or a path
ImageLike: TypeAlias = Image.Image | np.ndarray | str | os.PathLike[str]
MODES = {1: "L", 3: "RGB"}  # channels -> mode of PIL
IN_WORDS = {  # mode of PIL -> description in errors
  "L": "grey",
  "LA": "grey with transparency",
  "P": "of a palette",
  "RGBA": "RGB with transparency",
}
HIDDEN_FROM = 128  # smallest grey level of a mask that hides a pixel


def read_images(
  setting: str, image: ImageLike, count: int, size: Size, channels: int
) -> UInt8[np.ndarray, "*N H W C"]:
  """Reads one image for all labels, or an array with one image for each label.

  Args:
    setting: name of the argument in errors.
    image: see `read_image`, or an array (N, H, W, channels).
    count: N, number of labels.
    size, channels: see `read_image`.

  Returns:
    (H, W, channels) or (N, H, W, channels) uint8.

  Raises:
    SettingError: see `read_image`; or the array holds another number of images than
      `count`.
  """
  if not (isinstance(image, np.ndarray) and image.ndim == 4):
    return read_image(setting, image, size, channels)
  if len(image) != count:
    raise SettingError(
      setting, f"{len(image)} images", f"must be {count}, one for each label"
    )
  return np.stack([read_image(setting, one, size, channels) for one in image])


def read_image(
  setting: str, image: ImageLike, size: Size, channels: int
) -> UInt8[np.ndarray, "H W C"]:
  """Reads an image of the model's size.

  The function does not resize images, because visible pixels must not change.

  Args:
    setting: name of the argument in errors.
    image: PIL image, uint8 array (H, W) or (H, W, C), or path.
    size: height and width of the model's images, see `mdt_jax.sizes`.
    channels: channels of the model's images, 1 or 3.

  Returns:
    (H, W, channels) uint8.

  Raises:
    SettingError: the image cannot be read, or has another size or other channels than
      the model's images.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
      raise SettingError(
        setting, f"{image.dtype} {image.shape}", "must be uint8 (H, W) or (H, W, C)"
      )
    pixels = image[..., None] if image.ndim == 2 else image
  else:
    opened = _open(setting, image)
    if opened.mode != MODES[channels]:
      wanted, found = (IN_WORDS.get(m, m) for m in (MODES[channels], opened.mode))
      raise SettingError(setting, _name(image), f"must be {wanted}, is {found}")
    pixels = np.asarray(opened).reshape(opened.height, opened.width, channels)
  if pixels.shape != (*height_width(size), channels):
    raise SettingError(
      setting,
      "x".join(map(str, pixels.shape)),
      f"must have the model's size, {describe_size(size)}x{channels}",
    )
  return pixels


def read_mask(
  setting: str, mask: ImageLike | None, size: Size
) -> Bool[np.ndarray, "H W"]:
  """Reads a mask of the pixels to paint.

  Args:
    setting: name of the argument in errors.
    mask: PIL image or path, or array (H, W) uint8 or bool. White (at least
      `HIDDEN_FROM`) or True marks a pixel to paint.
    size: height and width of the image, see `mdt_jax.sizes`.

  Returns:
    (H, W) bool, True where the image is painted.

  Raises:
    SettingError: the mask is None, cannot be read, has another size, or marks all or no
      pixels.
  """
  if mask is None:
    raise SettingError(setting, None, "must be given: white marks the part to paint")
  if isinstance(mask, np.ndarray) and mask.dtype == bool:
    hidden = mask
  elif isinstance(mask, np.ndarray) and mask.dtype == np.uint8:
    hidden = mask >= HIDDEN_FROM
  elif isinstance(mask, np.ndarray):
    raise SettingError(setting, f"{mask.dtype} array", "must be bool or uint8")
  else:
    hidden = np.asarray(_open(setting, mask).convert("L")) >= HIDDEN_FROM
  if hidden.shape != height_width(size):
    raise SettingError(
      setting,
      "x".join(map(str, hidden.shape)),
      f"must have the size of the image, {describe_size(size)}",
    )
  if hidden.all() or not hidden.any():
    what = "has only white pixels" if hidden.all() else "has no white pixel"
    raise SettingError(setting, _name(mask), f"{what}: white marks the part to paint")
  return hidden


def downsample_mask(
  setting: str, hidden: Bool[np.ndarray, "H W"], factor: int
) -> Bool[np.ndarray, "h w"]:
  """Downsamples a mask of pixels to a mask of latents.

  A latent is hidden if any of its pixels is hidden.

  Args:
    setting: name of the argument in errors.
    hidden: (H, W) bool, True for hidden pixels.
    factor: downsampling factor of the autoencoder.

  Returns:
    (H / factor, W / factor) bool, True for hidden latents.

  Raises:
    SettingError: every latent is hidden.
  """
  height, width = (side // factor for side in hidden.shape)
  pixels = hidden.reshape(height, factor, width, factor)
  blocks = np.asarray(pixels.any(axis=(1, 3)))
  if blocks.all():
    raise SettingError(
      setting,
      "mask",
      f"must leave at least one block of {factor}x{factor} pixels black",
    )
  return blocks


def hidden_tokens(
  hidden: Bool[np.ndarray, "H W"], patch_size: int
) -> Bool[np.ndarray, "L"]:
  """The tokens whose patches are wholly hidden.

  Args:
    hidden: (H, W) bool mask of the network's input.
    patch_size: height and width of a patch.

  Returns:
    (L,) bool, True for hidden tokens.
  """
  height, width = (side // patch_size for side in hidden.shape)
  patches = hidden.reshape(height, patch_size, width, patch_size)
  return patches.all(axis=(1, 3)).reshape(-1)


def _open(setting: str, image: Image.Image | str | os.PathLike[str]) -> Image.Image:
  """Opens a picture from a path; raises SettingError if it cannot be read."""
  if isinstance(image, Image.Image):
    return image
  if not isinstance(image, (str, os.PathLike)):
    raise SettingError(setting, _name(image), "must be a PIL image, an array or a path")
  file = input_file(setting, image)
  try:
    return open_image(file if isinstance(file, Path) else io.BytesIO(file.read_bytes()))
  except UnidentifiedImageError as error:
    raise SettingError(
      setting, str(image), f"cannot be read as an image: {error}"
    ) from None
  except OSError as error:
    raise SettingError(
      setting, str(image), f"cannot be read: {error.strerror or error}"
    ) from None
  except Exception as error:  # Pillow's decoders raise nearly every type
    raise SettingError(
      setting, str(image), f"cannot be read as an image: {error}"
    ) from None


def _name(image: ImageLike) -> str:
  """The path or the type of an image, for errors."""
  return str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
