"""Where the images to be scored come from: a file, a run's data, or its network.

Each is an `ImageStream`: it says how many there are, and gives them in batches, so that
any number of images takes the memory of one batch.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.data.sources import Source
from mdt_jax.errors import SettingError
from mdt_jax.sampling import batches
from mdt_jax.sampling.pictures import to_uint8
from mdt_jax.sharding import fetch

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

IMAGES, LABELS = "arr_0", "arr_1"  # members of an .npz, as ADM names them
# (images (B, H, W, C) in [0, 255], uint8 or float32; labels (B,) or None)
Batch = tuple[np.ndarray, np.ndarray | None]


class ImageStream(Protocol):
  """Images, some number at a time; the last batch may be shorter."""

  def __len__(self) -> int: ...

  def batches(self, batch_size: int) -> Iterator[Batch]: ...


class NpzImages:
  """The images of an .npz file, read as a stream and checked.

  Args:
    path: its arr_0 holds (N, H, W, 1 or 3) uint8, or floats in [0, 255]; its arr_1,
      if it is there, N labels.
    setting: that names the file, for errors.

  Raises:
    SettingError: no such file or array, another dtype or rank, or pickled objects; and
      while it is read: images that are cut off, out of range or not finite, with the
      number of the first.
  """

  def __init__(self, path: str | Path, setting: str = "--samples"):
    self._path, self._setting = Path(path), setting
    with self._open() as member:
      self.shape, self._dtype = self._read_header(member)
    self._labels = self._read_labels()

  def __len__(self) -> int:
    return self.shape[0]

  def batches(self, batch_size: int) -> Iterator[Batch]:
    with self._open() as member:
      self._read_header(member)
      for start in range(0, len(self), batch_size):
        stop = min(start + batch_size, len(self))
        images = self._check(self._read(member, start, stop), start)
        yield images, None if self._labels is None else self._labels[start:stop]

  @contextlib.contextmanager
  def _open(self) -> Iterator[IO[bytes]]:
    try:
      with (
        zipfile.ZipFile(self._path) as archive,
        archive.open(f"{IMAGES}.npy") as member,
      ):
        yield member
    except SettingError:
      raise
    except FileNotFoundError:
      raise self._error("must be a file") from None
    except KeyError:
      raise self._error(f"holds no array {IMAGES}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
      raise self._error(f"no .npz file that can be read: {error}") from None

  def _read_header(self, member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    readers = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
      raise self._error(f"{IMAGES} is in version {version} of the .npy format")
    shape, fortran_order, dtype = readers[version](member)
    if dtype.hasobject:
      raise self._error(f"{IMAGES} holds pickled objects, which are not read")
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
    image_bytes = int(np.prod(self.shape[1:])) * self._dtype.itemsize
    data = member.read((stop - start) * image_bytes)
    whole = start + len(data) // image_bytes
    if whole < stop:
      raise self._error(f"{IMAGES} is cut off after {whole} of {len(self)} images")
    return np.frombuffer(data, self._dtype).reshape(-1, *self.shape[1:])

  def _check(self, images: np.ndarray, start: int) -> np.ndarray:
    """Finite floats in [0, 255], as float32; uint8 as it is."""
    if images.dtype == np.uint8:
      return images
    images = images.astype(np.float32)
    lowest, highest = (f(images, axis=(1, 2, 3)) for f in (np.min, np.max))
    bad = np.flatnonzero(~((lowest >= 0) & (highest <= 255)))  # also where it is NaN
    if bad.size:
      i = bad[0]
      raise self._error(
        f"image {start + i} holds numbers from {lowest[i]:g} to {highest[i]:g}; "
        "accepted are finite ones in [0, 255]"
      )
    if start == 0 and highest.max() <= 1:
      raise self._error(
        f"its first {len(images)} images hold numbers up to {highest.max():g}, as if "
        "in [0, 1]; accepted are numbers in [0, 255]"
      )
    return images

  def _read_labels(self) -> np.ndarray | None:
    try:
      with np.load(self._path, allow_pickle=False) as file:
        if LABELS not in file.files:
          return None
        labels = file[LABELS]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
      raise self._error(f"{LABELS} cannot be read: {error}") from None
    if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
      raise self._error(
        f"{LABELS} is of {labels.dtype} and of shape {labels.shape}; accepted are "
        f"whole numbers, one for each of the {len(self)} images"
      )
    return labels

  def _error(self, accepted: str) -> SettingError:
    return SettingError(self._setting, str(self._path), accepted)


class SourceImages:
  """Images of a run's data, spread evenly over it.

  Args:
    source: of uint8 images; see `mdt_jax.data.sources`.
    num_images: as many, or all if there are fewer.
    setting: what would name other images, for errors.

  Raises:
    SettingError: while it is read, where the data holds no images.
  """

  def __init__(self, source: Source, num_images: int, setting: str = "--reference"):
    self._source, self._setting = source, setting
    count = min(num_images, len(source))
    self._indices = np.linspace(0, len(source) - 1, count).round().astype(int)

  def __len__(self) -> int:
    return len(self._indices)

  def batches(self, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(self), batch_size):
      indices = self._indices[start : start + batch_size]
      examples = [self._source[int(i)] for i in indices]
      if "image" not in examples[0] or examples[0]["image"].dtype != np.uint8:
        raise SettingError(
          self._setting, None, "must be given: the run's data holds no images"
        )
      yield tuple(
        np.stack([example[name] for example in examples]) for name in ("image", "label")
      )


class GeneratedImages:
  """Images that a network draws: the classes in turn, image i from (seed, i).

  Of several processes all must read the stream, and each gets the whole batches.

  Attributes:
    labels: (N,) their classes.
    image_shape: (H, W, C).

  Args:
    config: of the run; `config.sampling` says how images are drawn.
    generator: of `sampling.batches.make_generator(config)`.
    params: averaged parameters; images are drawn where they lie, spread over the
      devices inside `sharding.use_mesh`.
    num_images: how many.
    autoencoder: decodes latents.
    seed: in [0, 2**32).

  Raises:
    SettingError: the network draws latents, and nothing decodes them.
  """

  def __init__(
    self,
    config: ConfigDict,
    generator: batches.Generator,
    params: Any,
    num_images: int,
    autoencoder: Autoencoder | None = None,
    seed: int = 0,
  ):
    if autoencoder is None and not factories.holds_pixels(config):
      raise SettingError(
        "config.data.vae", None, "must be given: images are scored, not latents"
      )
    self._generator, self._params, self._seed = generator, params, seed
    self.labels = np.arange(num_images) % config.model.num_classes
    self.image_shape = factories.image_shape(config, autoencoder)
    self._autoencoder = autoencoder

  def __len__(self) -> int:
    return len(self.labels)

  def batches(self, batch_size: int) -> Iterator[Batch]:
    drawn = batches.generate_batches(
      self._generator,
      self._params,
      self.labels,
      seed=self._seed,
      batch_size=batch_size,
    )
    start = 0
    for arrays in drawn:
      labels = self.labels[start : start + len(arrays)]
      start += len(arrays)
      if self._autoencoder is not None:
        arrays = fetch(self._autoencoder.decode(arrays))
      yield to_uint8(arrays), labels
