"""Transforms of examples: centre crop, random flip, and scaling to [-1, 1]."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from mdt_jax.data.examples import Example
from mdt_jax.errors import SettingError
from mdt_jax.sizes import Size, height_width


def center_crop(image: Image.Image, size: Size) -> Image.Image:
  """Scales an image until it just covers `size`, and crops the centre, as ADM does.

  For a square, steps and rounding equal those of ADM's data loader, because the
  reference statistics of ADM's evaluation suite were computed on images cropped in this
  way. ADM crops squares only; other sizes follow the same steps.

  Args:
    image: an image of any size and mode.
    size: height and width of the result in pixels, see `mdt_jax.sizes`.

  Returns:
    An image of this size in the mode of `image`.
  """
  height, width = height_width(size, "image_size")
  # Averaging 2x2 blocks first avoids aliasing in the bicubic resize.
  while image.height >= 2 * height and image.width >= 2 * width:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = max(height / image.height, width / image.width)
  scaled = round(image.width * scale), round(image.height * scale)
  image = image.resize(scaled, Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - height) // 2
  return image.crop((left, top, left + width, top + height))


def to_float(image: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
  """Scales uint8 pixels in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1."""
  return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def pixels_to_float(batch: Example) -> Example:
  """Scales the "image" of an example or a batch to [-1, 1] if its dtype is uint8."""
  if "image" not in batch or batch["image"].dtype != np.uint8:
    return batch
  return {**batch, "image": to_float(batch["image"])}


def check_labels(batch: Example, num_classes: int) -> Example:
  """Returns a batch; raises SettingError if a class label is out of range.

  Args:
    batch: an example or a batch. A "label" that is not an integer is not a class.
    num_classes: class labels lie in [0, num_classes).
  """
  labels = np.asarray(batch.get("label", 0))
  if np.issubdtype(labels.dtype, np.integer):
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
      raise SettingError(
        "source",
        f"label {wrong.flat[0]}",
        f"labels must lie in [0, num_classes) = [0, {num_classes})",
      )
  return batch


def random_flip(example: Example, rng: np.random.Generator) -> Example:
  """Mirrors an image left to right with probability 1/2; for grain's random_map.

  A float "image" is never mirrored: it may be a latent, and a mirrored latent is not
  the latent of the mirrored image.

  Args:
    example: holds "image" (H, W, C), or "views" (2, 2, H, W, C), the moments of the
      latents of an image and of its mirror image. Other entries are kept, but for the
      text "caption".
    rng: random generator, from which one number is drawn.

  Returns:
    A new example; "moments" (2, H, W, C) replaces "views".
  """
  example = _without_text(example)
  flip = rng.random() < 0.5
  if "views" in example:
    return _choose_view(example, int(flip))
  image = example["image"]
  if flip and image.dtype == np.uint8:
    image = image[:, ::-1]
  return {**example, "image": image}


def without_draws(example: Example) -> Example:
  """Returns the example in the form of `random_flip`, without a flip."""
  example = _without_text(example)
  return _choose_view(example, 0) if "views" in example else example


def _without_text(example: Example) -> Example:
  """Returns an example without its caption: no device holds texts."""
  return {name: value for name, value in example.items() if name != "caption"}


def _choose_view(example: Example, view: int) -> Example:
  """Replaces "views" by "moments" of the image (0) or of its mirror image (1)."""
  rest = {name: value for name, value in example.items() if name != "views"}
  return {**rest, "moments": example["views"][view]}
