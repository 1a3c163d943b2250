"""Reference batches for the evaluation of samples, in ADM's form."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.data.images import ImageSource
from mdt_jax.data.latents import Progress
from mdt_jax.errors import SettingError


def write_reference_batch(
  path: str | os.PathLike[str],
  source: ImageSource,
  num_images: int,
  progress: Progress = lambda count: None,
) -> int:
  """Writes images of a source, evenly spaced, to an .npz file.

  The file holds arr_0, uint8 (N, H, W, C), and arr_1, int32 labels (N,). Unreadable
  images are left out.

  Args:
    path: of the file; must end in .npz.
    source: of the images.
    num_images: images to take, or all if the source has fewer.
    progress: called with the number of further images done.

  Returns:
    The number of images written.

  Raises:
    SettingError: `path` ends in something else; too many images are unreadable.
  """
  path = Path(path)
  if path.suffix != ".npz":
    raise SettingError("--reference_batch", str(path), "must end in .npz")
  count = min(num_images, len(source))
  images = np.empty((count, *source.image_shape), np.uint8)
  labels = np.empty(count, np.int32)
  row = 0
  for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
    progress(1)
    try:
      example = source.load(index)
    except Exception as error:  # Pillow's decoders raise nearly every type.
      source.leave_out(index, error)
      continue
    images[row], labels[row] = example["image"], example["label"]
    row += 1
  with atomic_write(path) as partial, partial.open("wb") as file:
    np.savez(file, images[:row], labels[:row])
  return row
