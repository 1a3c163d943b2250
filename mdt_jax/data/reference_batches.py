"""Writes reference batches of real images, in ADM's format, for evaluation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import is_bucket
from mdt_jax.data.images import ImageSource
from mdt_jax.data.latents import Progress
from mdt_jax.errors import SettingError
from mdt_jax.paths import absolute


def write_reference_batch(
  path: str | os.PathLike[str],
  source: ImageSource,
  num_images: int,
  progress: Progress = lambda count: None,
) -> int:
  """Writes evenly spaced images of a source to an .npz file.

  The file holds arr_0, images uint8 (N, H, W, C), and arr_1, labels int32 (N,).
  Unreadable images are skipped.

  Args:
    path: path of the file; must end in .npz.
    source: the images.
    num_images: number of images to select; all images if the source has fewer.
    progress: called with the number of images done since the last call.

  Returns:
    The number of images written.

  Raises:
    SettingError: `path` does not end in .npz, or too many images are unreadable.
  """
  path = absolute(path) if is_bucket(path) else Path(path)
  if path.suffix != ".npz":
    raise SettingError("--reference_batch", str(path), "must end in .npz")
  count = min(num_images, len(source))
  images = np.empty((count, *source.image_shape), np.uint8)
  labels = np.empty(count, np.int32)
  row = 0
  for index in np.linspace(0, len(source) - 1, count).round().astype(int).tolist():
    progress(1)
    example = source.load_or_leave_out(index)
    if example is None:
      continue
    images[row], labels[row] = example["image"], example["label"]
    row += 1
  with atomic_write(path) as partial, partial.open("wb") as file:
    np.savez(file, images[:row], labels[:row])
  return row
