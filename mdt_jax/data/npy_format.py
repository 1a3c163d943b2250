"""Reads .npy headers and arrays that may be damaged or made to do harm.

`numpy.load` takes the memory that a header claims before it reads any data, and raises
many types of errors for a damaged header.
"""

from __future__ import annotations

import io
import lzma
import math
import tokenize
import warnings
import zipfile
import zlib
from typing import IO, NamedTuple

import ml_dtypes
import numpy as np

# Everything that reading a damaged .npz or .npy file raises. RuntimeError: an encrypted
# member; NotImplementedError, an unknown compression, is a RuntimeError.
ERRORS = (
  OSError,
  ValueError,
  EOFError,
  MemoryError,
  OverflowError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
)
# Deflate packs at most 1,032 bytes into one.
MAX_RATIO = 1100
CHUNK = 1 << 20  # bytes read at once


class Header(NamedTuple):
  """The header of an .npy file.

  Attributes:
    shape: shape of the array.
    fortran_order: whether the array is stored in Fortran order.
    dtype: dtype of the array, without objects.
  """

  shape: tuple[int, ...]
  fortran_order: bool
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    """Size of the array in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes]) -> Header:
  """Reads the header of an .npy file.

  Args:
    file: the file; it is at its data afterwards.

  Raises:
    ValueError: the header is damaged, or describes objects, which would be pickles.
  """
  version = np.lib.format.read_magic(file)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f"version {version} of the .npy format is not read")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      shape, fortran_order, dtype = readers[version](file)
  except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
    raise ValueError("the header is damaged") from None
  if not all(type(side) is int and side >= 0 for side in shape):
    raise ValueError(f"shape {shape} must hold whole numbers from 0")
  if dtype.hasobject:
    raise ValueError("the array holds pickled objects, which are not read")
  return Header(shape, fortran_order, dtype)


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  """Reads an array of an .npz file.

  Args:
    archive: the .npz file.
    name: name of the array, without ".npy".

  Raises:
    one of ERRORS: the member is missing, damaged, encrypted or larger than its file.
  """
  try:
    info = archive.getinfo(f"{name}.npy")
  except KeyError:
    raise ValueError(f"{name} is missing") from None
  if info.file_size > MAX_RATIO * info.compress_size + 1000:
    raise ValueError(f"{name} claims more bytes than its file can hold")
  with archive.open(info) as member:
    header = read_header(member)
    if header.num_bytes > info.file_size:
      raise ValueError(
        f"{name} has shape {header.shape}, for which its file is too short"
      )
    data = np.empty(header.num_bytes, np.uint8)
    for start in range(0, len(data), CHUNK):
      part = member.read(min(CHUNK, len(data) - start))
      data[start : start + len(part)] = np.frombuffer(part, np.uint8)
      if start + len(part) < min(start + CHUNK, len(data)):
        raise EOFError(f"{name} is cut off")
    if member.read(1):  # reads to the end, where zipfile compares the CRC-32
      raise ValueError(f"{name} holds more than its array")
  order = "F" if header.fortran_order else "C"
  return data.view(header.dtype).reshape(header.shape, order=order)


def read_npy(data: bytes) -> np.ndarray:
  """Reads an .npy file; raises ValueError if it claims more bytes than it has."""
  file = io.BytesIO(data)
  header = read_header(file)
  if header.num_bytes > len(data):
    raise ValueError(f"shape {header.shape} needs more bytes than the file has")
  file.seek(0)
  return with_bfloat16(np.load(file, allow_pickle=False))


def with_bfloat16(array: np.ndarray) -> np.ndarray:
  """Returns an array as it was saved: NumPy saves bfloat16 as 2 bytes without a type.

  An array of any other type is returned as it is.
  """
  return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def member_names(archive: zipfile.ZipFile) -> list[str]:
  """Returns the names of the arrays of an .npz file."""
  names = [info.filename for info in archive.infolist()]
  return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
