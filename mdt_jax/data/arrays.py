"""Arrays in .npy files, such as latents that are already scaled; used as stored."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float32

from mdt_jax.data import npy_format
from mdt_jax.data.examples import SourceArguments, shape_error
from mdt_jax.data.files import ARRAY_EXTENSIONS, Files, FileSource, open_files
from mdt_jax.data.npz import NpzSource, is_array_file, open_array_file
from mdt_jax.sizes import Size


class ArraySource(FileSource):
  """A source of float arrays, one per .npy file.

  The entry "image" of an example is float32 (H, W, channels) and
  finite. It is neither scaled nor flipped.

  Args:
    files: the .npy files.
    image_size: height and width of an array, see `mdt_jax.sizes`.
    channels: number of channels of an array.
    max_unreadable: largest accepted number of unreadable arrays.

  Raises:
    SettingError: the first array has another shape.
  """

  def __init__(
    self, files: Files, image_size: Size, channels: int, max_unreadable: int
  ):
    super().__init__(files, image_size, channels, max_unreadable)
    try:
      found = npy_format.read_header(io.BytesIO(files.read(0)[0])).shape
    except Exception:  # `__getitem__` handles unreadable arrays.
      return
    if found != self.image_shape:
      raise shape_error(self._path, found, self.image_shape)

  def decode(self, data: bytes) -> Float32[np.ndarray, "H W C"]:
    """Decodes an .npy file; raises ValueError for another shape, dtype, or NaNs."""
    # The header comes first: it may claim more memory than there is.
    found = npy_format.read_header(io.BytesIO(data))
    if found.shape != self.image_shape or found.dtype.kind != "f":
      raise ValueError(
        f"must be floats of shape {self.image_shape}, found {found.dtype} of shape "
        f"{found.shape}"
      )
    array = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
    if not np.isfinite(array).all():
      raise ValueError("must be finite")  # one NaN would end a training run
    return array


def open_arrays(arguments: SourceArguments) -> ArraySource | NpzSource:
  """Opens a folder or tar files of .npy files, or one file that holds all arrays.

  The path is one of `files.open_files` or of `npz.read_arrays`.
  """
  if is_array_file(arguments.path):
    return open_array_file(arguments, pixels=False)
  return ArraySource(
    open_files(arguments.path, arguments.split, ARRAY_EXTENSIONS),
    arguments.image_size,
    arguments.channels,
    arguments.max_unreadable,
  )
