"""Images to paint in or to edit: reading and checking them and their masks."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from mdt_jax.errors import SettingError

# A picture, an array (H, W) or (H, W, C), or a path
ImageLike: TypeAlias = Image.Image | np.ndarray | str | Path
MODES = {1: "L", 3: "RGB"}  # channels -> mode of PIL
IN_WORDS = {
  "L": "grey",
  "LA": "grey with transparency",
  "P": "of a palette",
  "RGBA": "RGB with transparency",
}
HIDDEN_FROM = 128  # smallest grey level of a mask that hides a pixel


def read_images(
  setting: str, image: ImageLike, count: int, size: int, channels: int
) -> UInt8[np.ndarray, "*N H W C"]:
  """Pixels of one image, or of an array of one image for each label.

  Args:
    setting: name of the argument in errors.
    image: see `read_image`, or an array (N, size, size, channels).
    count: N, number of labels.
    size, channels: see `read_image`.

  Returns:
    (size, size, channels) or (N, size, size, channels) uint8.

  Raises:
    SettingError: as `read_image`, or the array has another number of images.
  """
  if not (isinstance(image, np.ndarray) and image.ndim == 4):
    return read_image(setting, image, size, channels)
  if len(image) != count:
    raise SettingError(setting, f"{len(image)} images", f"must be {count}, as labels")
  return np.stack([read_image(setting, one, size, channels) for one in image])


def read_image(
  setting: str, image: ImageLike, size: int, channels: int
) -> UInt8[np.ndarray, "H W C"]:
  """Pixels of an image of the model's size.

  Args:
    setting: name of the argument in errors.
    image: picture, uint8 array (H, W) or (H, W, C), or path.
    size: height and width of the model's images.
    channels: 1 or 3.

  Returns:
    (size, size, channels) uint8.

  Raises:
    SettingError: there is no image, or its mode or its size is not that of the model.
      Images are not resized, because their visible pixels must not change.
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
  if pixels.shape != (size, size, channels):
    raise SettingError(
      setting,
      "x".join(map(str, pixels.shape)),
      f"must have the model's size, {size}x{size}x{channels}",
    )
  return pixels


def read_mask(
  setting: str, mask: ImageLike | None, size: int
) -> Bool[np.ndarray, "H W"]:
  """The hidden pixels of an image, which are painted.

  Args:
    setting: name of the argument in errors.
    mask: picture or path, or array (H, W) uint8 or bool; white, or True, is hidden.
    size: height and width of the image.

  Returns:
    (size, size) bool.

  Raises:
    SettingError: there is no mask, it has another size, or it hides everything or
      nothing.
  """
  if mask is None:
    raise SettingError(setting, None, "must be given: what is white is painted")
  if isinstance(mask, np.ndarray) and mask.dtype == bool:
    hidden = mask
  elif isinstance(mask, np.ndarray) and mask.dtype == np.uint8:
    hidden = mask >= HIDDEN_FROM
  elif isinstance(mask, np.ndarray):
    raise SettingError(setting, f"{mask.dtype} array", "must be bool or uint8")
  else:
    hidden = np.asarray(_open(setting, mask).convert("L")) >= HIDDEN_FROM
  if hidden.shape != (size, size):
    raise SettingError(
      setting, "x".join(map(str, hidden.shape)), f"must have the image's {size}x{size}"
    )
  if hidden.all() or not hidden.any():
    what = "hides everything" if hidden.all() else "hides nothing"
    raise SettingError(
      setting, _name(mask), f"{what}: what is white is painted, the rest is kept"
    )
  return hidden


def downsample_mask(
  setting: str, hidden: Bool[np.ndarray, "H W"], factor: int
) -> Bool[np.ndarray, "h w"]:
  """The hidden latents of an image: those with a hidden pixel.

  Args:
    setting: name of the argument in errors.
    hidden: (H, W) hidden pixels.
    factor: height of an image over height of its latents.

  Returns:
    (H / factor, W / factor) bool.

  Raises:
    SettingError: every latent is hidden.
  """
  height, width = (side // factor for side in hidden.shape)
  pixels = hidden.reshape(height, factor, width, factor)
  blocks = np.asarray(pixels.any(axis=(1, 3)))
  if blocks.all():
    raise SettingError(
      setting, "mask", f"leaves no block of {factor}x{factor} pixels wholly visible"
    )
  return blocks


def hidden_tokens(
  hidden: Bool[np.ndarray, "H W"], patch_size: int
) -> Bool[np.ndarray, "L"]:
  """Tokens (L,) without a visible part, of the mask (H, W) of a network's input."""
  height, width = (side // patch_size for side in hidden.shape)
  patches = hidden.reshape(height, patch_size, width, patch_size)
  return patches.all(axis=(1, 3)).reshape(-1)


def _open(setting: str, image: Image.Image | str | Path) -> Image.Image:
  if isinstance(image, Image.Image):
    return image
  if not isinstance(image, (str, Path)):
    raise SettingError(setting, _name(image), "must be a picture, an array or a path")
  try:
    opened = Image.open(image)
    opened.load()
  except UnidentifiedImageError:
    raise SettingError(setting, str(image), "is no image that can be read") from None
  except OSError as error:
    raise SettingError(
      setting, str(image), f"cannot be read: {error.strerror or error}"
    ) from None
  return opened


def _name(image: ImageLike) -> str:
  return str(image) if isinstance(image, (str, Path)) else type(image).__name__
