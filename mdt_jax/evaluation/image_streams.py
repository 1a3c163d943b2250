"""Streams of images to score: from a file, from a run's data, or from a network.

An `ImageStream` knows its number of images and yields one batch after another, so only
one batch is in memory.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np
from jaxtyping import Num

from mdt_jax import buckets
from mdt_jax.buckets import AnyPath
from mdt_jax.data import npy_format
from mdt_jax.data.conditions import arrays_of, stack_arrays
from mdt_jax.data.sources import Source
from mdt_jax.errors import SettingError
from mdt_jax.models.registry import Model
from mdt_jax.paths import input_file
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sampling.blocks import generate_batches
from mdt_jax.sampling.conditions import Conditions
from mdt_jax.sampling.generator import Generator, output_shape
from mdt_jax.sampling.pictures import to_uint8
from mdt_jax.sharding import fetch
from mdt_jax.types import Params

IMAGES, LABELS = "arr_0", "arr_1"  # arrays of an .npz file, with ADM's names
# (images (B, H, W, C) in [0, 255], uint8 or float32; labels (B,) or None)
LabelledImages: TypeAlias = tuple[np.ndarray, np.ndarray | None]


@contextlib.contextmanager
def open_npz(path: AnyPath) -> Iterator[zipfile.ZipFile]:
  """Opens an .npz file; reads that of a bucket part by part, without a local copy.

  Raises:
    FileNotFoundError: there is no such file.
    one of npy_format.ERRORS: the file is not a readable .npz file, or its bucket does
      not answer, now or during the block.
  """
  if isinstance(path, Path):
    with zipfile.ZipFile(path) as archive:
      yield archive
    return
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      yield archive
  except (SettingError, KeyError, *npy_format.ERRORS):
    raise
  except Exception as error:  # gcsfs raises those of several libraries
    raise OSError(buckets.describe_error(error, path)) from None


class ImageStream(Protocol):
  """Interface of a number of images that are read in batches."""

  def __len__(self) -> int:
    """Number of images."""
    ...

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    """Yields batches of `batch_size` images; the last batch may be shorter."""
    ...


class NpzImages:
  """The images of an .npz file; checks each batch.

  Attributes:
    shape: (N, H, W, C).

  Args:
    path: file with images arr_0 (N, H, W, 1 or 3), uint8 or floats in [0, 255], and
      optional integer labels arr_1 (N,).
    setting: name of the setting that holds `path`, for errors.

  Raises:
    SettingError: the file or arr_0 does not exist, or has another dtype or shape.
      `batches` raises the error too, for images that are cut off, out of range or not
      finite; the error names the first such image.
  """

  def __init__(self, path: str | os.PathLike[str], setting: str = "path"):
    self._path, self._setting = input_file(setting, path), setting
    with self._open() as member:
      self.shape, self._dtype = self._read_header(member)
    self._labels = self._read_labels()

  def __len__(self) -> int:
    return self.shape[0]

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    with self._open() as member:
      self._read_header(member)
      for start in range(0, len(self), batch_size):
        stop = min(start + batch_size, len(self))
        images = self._check(self._read(member, start, stop), start)
        yield images, None if self._labels is None else self._labels[start:stop]

  @contextlib.contextmanager
  def _open(self) -> Iterator[IO[bytes]]:
    """Opens arr_0; raises SettingError if the file cannot be read."""
    try:
      with (
        open_npz(self._path) as archive,
        archive.open(f"{IMAGES}.npy") as member,
      ):
        yield member
    except SettingError:
      raise
    except FileNotFoundError:
      raise self._error("must be a file") from None
    except KeyError:
      raise self._error(f"holds no array {IMAGES}") from None
    except npy_format.ERRORS as error:
      raise self._error(f"is not a readable .npz file: {error}") from None

  def _read_header(self, member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Reads and checks the shape and the dtype of arr_0."""
    shape, fortran_order, dtype = npy_format.read_header(member)
    if dtype != np.uint8 and dtype.kind != "f":
      raise self._error(
        f"{IMAGES} is of {dtype}; accepted are uint8, and floats in [0, 255]"
      )
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
      raise self._error(f"{IMAGES} has shape {shape}; accepted is (N, H, W, 1 or 3)")
    if fortran_order:
      raise self._error(f"{IMAGES} is in Fortran order; accepted is C order")
    return shape, dtype

  def _read(self, member: IO[bytes], start: int, stop: int) -> np.ndarray:
    """Reads the images from number `start` up to `stop`."""
    image_bytes = int(np.prod(self.shape[1:])) * self._dtype.itemsize
    data = member.read((stop - start) * image_bytes)
    whole = start + len(data) // image_bytes
    if whole < stop:
      raise self._error(f"{IMAGES} is cut off after {whole} of {len(self)} images")
    return np.frombuffer(data, self._dtype).reshape(-1, *self.shape[1:])

  def _check(
    self, images: Num[np.ndarray, "B H W C"], start: int
  ) -> Num[np.ndarray, "B H W C"]:
    """Returns uint8 or float32 images; raises unless they are finite and in [0, 255].

    Args:
      images: images of the file.
      start: number of the first image, for errors.
    """
    if images.dtype == np.uint8:
      return images
    images = images.astype(np.float32)
    lowest, highest = (f(images, axis=(1, 2, 3)) for f in (np.min, np.max))
    bad = np.flatnonzero(~((lowest >= 0) & (highest <= 255)))  # NaN counts as bad
    if bad.size:
      i = bad[0]
      raise self._error(
        f"image {start + i} holds numbers from {lowest[i]:g} to {highest[i]:g}; "
        "accepted are finite numbers in [0, 255]"
      )
    if start == 0 and highest.max() <= 1:
      raise self._error(
        f"its first {len(images)} images hold no number above {highest.max():g}, so "
        "they seem to lie in [0, 1]; accepted are numbers in [0, 255]"
      )
    return images

  def _read_labels(self) -> np.ndarray | None:
    """Reads and checks arr_1; None if the file has no labels."""
    try:
      with open_npz(self._path) as file:
        if LABELS not in npy_format.member_names(file):
          return None
        labels = npy_format.read_member(file, LABELS)
    except npy_format.ERRORS as error:
      raise self._error(f"{LABELS} cannot be read: {error}") from None
    if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
      raise self._error(
        f"{LABELS} is of {labels.dtype} and of shape {labels.shape}; accepted are "
        f"whole numbers, one for each of the {len(self)} images"
      )
    return labels

  def _error(self, accepted: str) -> SettingError:
    """A SettingError about the file."""
    return SettingError(self._setting, str(self._path), accepted)


class SourceImages:
  """Images of a run's data, spread evenly over the data.

  Args:
    source: data with uint8 images; see `mdt_jax.data.sources`.
    num_images: number of images, at most.
    setting: name of the setting for a file of images, which the error asks for if the
      data holds no images.

  Raises:
    SettingError: `batches` raises the error if the data holds latents and no images.
  """

  def __init__(self, source: Source, num_images: int, setting: str = "reference"):
    self._source, self._setting = source, setting
    count = min(num_images, len(source))
    self._indices = np.linspace(0, len(source) - 1, count).round().astype(int)

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """Name -> (N, …), arrays of the conditions; reads the examples once more."""
    return stack_arrays([arrays_of(self._source[int(i)]) for i in self._indices])

  def __len__(self) -> int:
    return len(self._indices)

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    for start in range(0, len(self), batch_size):
      indices = self._indices[start : start + batch_size]
      examples = [self._source[int(i)] for i in indices]
      if "image" not in examples[0] or examples[0]["image"].dtype != np.uint8:
        raise SettingError(
          self._setting, None, "must be given: the run's data holds no images"
        )
      images = np.stack([example["image"] for example in examples])
      yield images, np.stack([example["label"] for example in examples])


class GeneratedImages:
  """Images that a network draws.

  All processes of a run must read the stream together; each process gets whole batches.

  Attributes:
    conditions: (N, …) conditions of the images, as the network reads them.
    labels: (N,) classes of the images; None if their condition has none.
    arrays: name -> (N, …), the arrays of the conditions.
    image_shape: (H, W, C) of an image.

  Args:
    model: the network.
    generator: generator from `sampling.generator.make_generator`.
    params: averaged parameters. The devices that hold the parameters draw the images,
      and share each batch inside `sharding.use_mesh`.
    conditions: conditions of the images; see `sampling.conditions`.
    autoencoder: decodes latents; None if the network draws pixels.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
    holds_pixels: whether the network draws pixels.

  Raises:
    SettingError: the network draws latents, and there is no autoencoder.
  """

  def __init__(
    self,
    model: Model,
    generator: Generator,
    params: Params,
    conditions: Conditions,
    autoencoder: Autoencoder | None = None,
    seed: int = 0,
    *,
    holds_pixels: bool,
  ):
    if autoencoder is None and not holds_pixels:
      raise SettingError(
        "config.data.vae", None, "must be given: images are scored, not latents"
      )
    self._generator, self._params, self._seed = generator, params, seed
    self.conditions, self.labels = conditions.y, conditions.labels
    self.arrays = conditions.arrays
    self._model = model
    self.image_shape = output_shape(model, autoencoder)
    self._autoencoder = autoencoder

  def __len__(self) -> int:
    return len(self.conditions)

  def batches(self, batch_size: int) -> Iterator[LabelledImages]:
    drawn = generate_batches(
      self._generator,
      self._params,
      self.conditions,
      seed=self._seed,
      batch_size=batch_size,
    )
    start = 0
    for arrays in drawn:
      labels = None
      if self.labels is not None:
        labels = self.labels[start : start + len(arrays)]
      start += len(arrays)
      if self._autoencoder is not None:
        arrays = fetch(self._autoencoder.decode(arrays))
      yield to_uint8(arrays, self._model), labels
