"""What happens to an image between the disk and the batch."""

from __future__ import annotations

import numpy as np
from PIL import Image


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """Scales the smaller side to `size` and cuts the middle square out, as ADM does.

  The steps and their rounding are those of ADM's data loader, because the reference
  statistics of its evaluation suite come from images prepared in this way.

  Args:
    image: an image of any size and mode.
    size: the side of the result in pixels.

  Returns:
    An image of size x size pixels in the mode of `image`.
  """
  # Averaging 2x2 blocks first keeps fine detail out of the bicubic step's aliases.
  while min(image.size) >= 2 * size:
    width, height = image.size
    image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = (round(side * scale) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def to_float(image: np.ndarray) -> np.ndarray:
  """Scales pixels to the range of the diffusion: x / 127.5 - 1.

  Args:
    image: uint8 array of any shape, in [0, 255].

  Returns:
    float32 array of the same shape, in [-1, 1].
  """
  return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def pixels_to_float(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch, with uint8 images scaled to [-1, 1]."""
  if "image" not in batch or batch["image"].dtype != np.uint8:
    return batch
  return {**batch, "image": to_float(batch["image"])}


def random_flip(
  example: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """Mirrors an image left to right with probability 1/2; a `grain` random map.

  Args:
    example: "image" (H, W, C), or "views" (2, 2, H, W, C), moments of the latents of
      an image and of its mirror, and anything else. Of images only uint8 ones are
      mirrored: floats may be latents, and the mirror of a latent is not the latent of
      the mirror.
    rng: decides; one number is drawn.

  Returns:
    A new example, with "moments" (2, H, W, C) in place of "views"; the argument is
    left as it is.
  """
  flip = rng.random() < 0.5
  if "views" in example:
    return _choose_view(example, int(flip))
  image = example["image"]
  if flip and image.dtype == np.uint8:
    image = image[:, ::-1]
  return {**example, "image": image}


def without_draws(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The example as it is, not mirrored; the form is that of `random_flip`."""
  return _choose_view(example, 0) if "views" in example else example


def _choose_view(example: dict[str, np.ndarray], view: int) -> dict[str, np.ndarray]:
  rest = {name: value for name, value in example.items() if name != "views"}
  return {**rest, "moments": example["views"][view]}
