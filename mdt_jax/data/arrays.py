"""Arrays in .npy files, such as latents that are already scaled."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float32

from mdt_jax.data.examples import SourceArguments, shape_error
from mdt_jax.data.files import ARRAY_EXTENSIONS, Files, FileSource, open_files
from mdt_jax.data.npz import NpzSource, is_array_file, open_array_file


class ArraySource(FileSource):
  """Arrays (image_size, image_size, channels) in .npy files, used as stored.

  "image" is float32 and finite; it is neither scaled nor flipped.

  Args:
    files: the .npy files.
    image_size: height and width of an array.
    channels: of an array.
    max_unreadable: how many arrays may be unreadable.

  Raises:
    SettingError: the first array has another shape.
  """

  def __init__(self, files: Files, image_size: int, channels: int, max_unreadable: int):
    super().__init__(files, image_size, channels, max_unreadable)
    try:
      found = np.load(io.BytesIO(files.read(0)[0]), allow_pickle=False).shape
    except Exception:  # `__getitem__` reports unreadable arrays.
      return
    if found != self.image_shape:
      raise shape_error(self._path, found, self.image_shape)

  def decode(self, data: bytes) -> Float32[np.ndarray, "H W C"]:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.shape != self.image_shape or array.dtype.kind != "f":
      raise ValueError(
        f"expected floats of shape {self.image_shape}, found {array.dtype} of shape "
        f"{array.shape}"
      )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError("expected finite numbers")  # One NaN would end a training run.
    return array


def open_arrays(arguments: SourceArguments) -> ArraySource | NpzSource:
  """Opens .npy files in a folder or tar files, or one file for a whole set.

  See `files.open_files` and `npz.read_arrays`.
  """
  if is_array_file(arguments.path):
    return open_array_file(arguments, pixels=False)
  return ArraySource(
    open_files(arguments.path, arguments.split, ARRAY_EXTENSIONS),
    arguments.image_size,
    arguments.channels,
    arguments.max_unreadable,
  )
