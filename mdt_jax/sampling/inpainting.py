"""Images that are given to be painted in or edited: their checks and their masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mdt_jax.errors import SettingError

ImageLike = Any  # PIL image, uint8 array (H, W) or (H, W, C), or a path
MODES = {1: "L", 3: "RGB"}  # channels -> mode of PIL
IN_WORDS = {
  "L": "grey",
  "LA": "grey with transparency",
  "P": "of a palette",
  "RGBA": "RGB with transparency",
}
HIDDEN_FROM = 128  # of a mask's 0 … 255


def read_image(setting: str, image: ImageLike, size: int, channels: int) -> np.ndarray:
  """Pixels (size, size, channels) uint8.

  Raises:
    SettingError: no image, or one of another mode or size than the model's. It is not
      resized, as its visible pixels are to stay what they are.
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


def read_mask(setting: str, mask: ImageLike, size: int) -> np.ndarray:
  """What is hidden, (size, size) bool: white in an image, True in an array.

  Raises:
    SettingError: no mask, one of another size, or one that hides all or nothing.
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


def downsample_mask(setting: str, hidden: np.ndarray, factor: int) -> np.ndarray:
  """Mask (H, W) of an image -> (H / factor, W / factor) of its latents.

  A latent is visible where all of its pixels are.

  Raises:
    SettingError: no latent is visible.
  """
  height, width = (side // factor for side in hidden.shape)
  blocks = hidden.reshape(height, factor, width, factor).any(axis=(1, 3))
  if blocks.all():
    raise SettingError(
      setting, "mask", f"leaves no block of {factor}x{factor} pixels wholly visible"
    )
  return blocks


def hidden_tokens(hidden: np.ndarray, patch_size: int) -> np.ndarray:
  """Tokens (L,) bool of which nothing is visible, of a mask (H, W) of the input."""
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
