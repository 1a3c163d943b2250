"""The interface of data sources, handling of unreadable examples, and subsets."""

from __future__ import annotations

import abc
import dataclasses
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Int

from mdt_jax.errors import DataUnavailable, SettingError, one_line
from mdt_jax.logs import logger
from mdt_jax.sizes import Size

# A dict with "label", an int32 scalar in [0, num_classes), and one of
#   "image": uint8 (H, W, C) in [0, 255], or float32 (H, W, C) to be used as stored;
#   "views": see `latents.LatentSource`.
Example: TypeAlias = dict[str, Any]

# Seconds to wait before an example is read again, if the machine may be the cause.
PAUSES = (1.0, 4.0, 15.0, 40.0)
# Errors of the system that belong to the file. All others may pass: a disk that is away
# (ESTALE, EIO, ETIMEDOUT), too many open files.
_ERRORS_OF_FILE = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EACCES,
  errno.EPERM,
  errno.ELOOP,
  errno.ENAMETOOLONG,
  errno.EINVAL,
)
_READ_FAILED = "pread() failed: "  # ArrayRecord's RuntimeError for an error of a disk


class Source(Protocol):
  """Interface of a source: labelled examples with random access.

  `loader.create_loader` turns a source into batches.

  A source may also have `class_names`, the name of each class, and `label_counts`, a
  dict label -> number of examples; see `class_labels.DataLabels`.

  Attributes:
    num_classes: labels lie in [0, num_classes).
    image_shape: (H, W, C) of an image or a latent.
  """

  num_classes: int
  image_shape: tuple[int, int, int]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class SourceArguments:
  """Arguments of the functions in `sources.SOURCES` that open a source.

  Attributes:
    path: path of the data; "" for a source without a path.
    split: split of a TFDS data set; other sources ignore it.
    image_size: height and width of the examples: one number for a square, or (height,
      width); see `mdt_jax.sizes`.
    channels: number of channels of the examples.
    max_unreadable: largest accepted number of unreadable examples.
    image_bits: bits of the values in image files of more than 8 bits.
    cache: local folder that receives a copy of a latent set in a bucket.
    arguments: more settings of the source, by name.
  """

  path: str
  split: str
  image_size: Size
  channels: int
  max_unreadable: int
  image_bits: int = 16
  cache: str | None = None
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load_patiently(load: Callable[[int], Example], index: int, name: str) -> Example:
  """Reads an example; waits and reads again after an error of the machine.

  Args:
    load: reads example `index`.
    index: index of the example.
    name: name of the example, for messages.

  Raises:
    DataUnavailable: the machine is still the cause after all `PAUSES`.
    Exception: any other exception of `load`: the example is unreadable.
  """
  for number, pause in enumerate(PAUSES):
    try:
      return load(index)
    except Exception as error:
      if not _may_pass(error):
        raise
      if number == 0:
        logger.warning(
          "%s cannot be read (%s: %s); trying again for %g s",
          name,
          type(error).__name__,
          one_line(error),
          sum(PAUSES),
        )
    time.sleep(pause)
  try:
    return load(index)
  except Exception as error:
    if not _may_pass(error):
      raise
    raise DataUnavailable(
      f"{name} cannot be read after {len(PAUSES) + 1} tries "
      f"({type(error).__name__}: {one_line(error)})"
    ) from error


def _may_pass(error: Exception) -> bool:
  """Whether an error in reading may be a fault of the machine, not of the example."""
  if isinstance(error, OSError):  # without a number: Pillow's for a damaged image
    return error.errno is not None and error.errno not in _ERRORS_OF_FILE
  is_of_array_record = isinstance(error, RuntimeError) and _READ_FAILED in str(error)
  return is_of_array_record or isinstance(error, MemoryError)


class TolerantSource(abc.ABC):
  """A source that replaces each unreadable example by the next readable one.

  So batches keep their size, and all processes read the same examples. An unreadable
  example is logged once. An example is not unreadable if the machine may be the cause;
  see `load_patiently`. Reading is thread-safe. Subclasses define `__len__`,
  `load(index)` and `name(index)`.

  Args:
    path: path of the data, as the user typed it; used in messages.
    max_unreadable: largest accepted number of unreadable examples.

  Raises:
    SettingError: raised by `__getitem__` if more than `max_unreadable` examples, or all
      examples, are unreadable.
    DataUnavailable: raised by `__getitem__` if the machine cannot read now.
  """

  def __init__(self, path: str, max_unreadable: int):
    self._path = path
    self._max_unreadable = max_unreadable
    self._unreadable: set[int] = set()
    self._lock = threading.Lock()

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def load(self, index: int) -> Example:
    """Reads example `index` without replacement; raises if it is unreadable."""

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """Returns the name of example `index`, for messages."""

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} must lie in [0, {len(self)})")
    return self.first_readable(
      (index + offset) % len(self) for offset in range(len(self))
    )

  def first_readable(self, indices: Iterable[int]) -> Example:
    """Reads the first readable example of `indices`.

    Raises:
      SettingError, DataUnavailable: see `TolerantSource`.
    """
    count = 0
    for index in indices:
      count += 1
      if index in self._unreadable:
        continue
      example = self.load_or_leave_out(index)
      if example is not None:
        return example
    raise self._none_readable(count)

  def load_or_leave_out(self, index: int) -> Example | None:
    """Reads example `index`; None, after `leave_out`, if the example is unreadable."""
    try:
      return load_patiently(self.load, index, self.name(index))
    except DataUnavailable:
      raise
    except Exception as error:  # Pillow's decoders raise nearly every type.
      self.leave_out(index, error)
      return None

  def readable(
    self, progress: Callable[[int], Any] = lambda count: None
  ) -> Iterator[Example]:
    """Yields the readable examples in order, and replaces none.

    Args:
      progress: called with the number of examples done since the last call.

    Raises:
      SettingError: more than `max_unreadable` examples, or all examples, are
        unreadable.
      DataUnavailable: the machine cannot read now.
    """
    is_any = False
    for index in range(len(self)):
      example = self.load_or_leave_out(index)
      if example is not None:
        is_any = True
        yield example
      progress(1)
    if not is_any:
      raise self._none_readable(len(self))

  def leave_out(self, index: int, error: Exception) -> None:
    """Counts and logs an unreadable example; raises SettingError if too many."""
    reason = f"{type(error).__name__}: {one_line(error)}"
    name = self.name(index)
    with self._lock:
      if index in self._unreadable:
        return  # another thread has counted this example
      self._unreadable.add(index)
      count = len(self._unreadable)
    logger.warning("Left out %s, which cannot be read (%s)", name, reason)
    if count > self._max_unreadable:
      raise SettingError(
        "config.data.max_unreadable",
        self._max_unreadable,
        f"{count} files cannot be read, the last is {name} ({reason}); repair or "
        "remove these files, or set a higher number",
      ) from error

  def _none_readable(self, count: int) -> SettingError:
    """Returns the error for `count` examples of which none is readable."""
    return SettingError(
      "config.data.path",
      self._path,
      f"must hold readable files; none of {count} files can be read",
    )

  def __getstate__(self) -> dict[str, Any]:
    """Drops the lock, which cannot be pickled for a worker process."""
    return {name: value for name, value in vars(self).items() if name != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _lock=threading.Lock())


@runtime_checkable
class SupportsReplacement(Protocol):
  """Interface of a source that can replace an unreadable example."""

  def first_readable(self, indices: Iterable[int], /) -> Example:
    """Reads the first readable example of `indices`."""
    ...


class Subset:
  """A source with the examples of another source at given indices (N,).

  An unreadable example is replaced by the next readable one of the subset, so that
  training reads no example that is held out for validation.
  """

  def __init__(self, source: Source, indices: Int[np.ndarray, " N"]):
    self.original, self._indices = source, indices
    self.num_classes = source.num_classes
    self.image_shape = source.image_shape
    self.class_names = getattr(source, "class_names", None)
    self.label_counts = getattr(source, "label_counts", None)  # of the whole source

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    first = int(self._indices[index])
    source = self.original
    if not isinstance(source, SupportsReplacement):
      return source[first]
    others = (
      int(self._indices[(index + offset) % len(self)]) for offset in range(1, len(self))
    )
    return source.first_readable(itertools.chain([first], others))


def original_source(source: Any) -> Any:
  """Returns the source that a subset, or a check of a user's source, reads."""
  while hasattr(source, "original"):
    source = source.original
  return source


def count_labels(labels: Int[np.ndarray, " N"]) -> dict[int, int]:
  """Returns label -> number of examples, in increasing order."""
  held, counts = np.unique(labels, return_counts=True)
  return dict(zip(held.tolist(), counts.tolist(), strict=True))


def split_indices(
  length: int, share: float
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " V"]]:
  """Splits the indices of `length` examples into training and validation indices.

  Args:
    length: number of examples.
    share: share of validation examples, in [0, 1]. They are evenly spaced.

  Returns:
    (training indices, validation indices), each sorted.
  """
  count = round(length * share)
  held_out = np.linspace(0, length - 1, count).round().astype(int)
  return np.setdiff1d(np.arange(length), held_out), held_out


def shape_error(
  path: str, found: tuple[int, ...], expected: tuple[int, int, int]
) -> SettingError:
  """Returns the error for arrays whose shape differs from the network's input."""
  return SettingError(
    "config.data.path",
    path,
    f"holds arrays of shape {found}; config.model.input_size and in_channels require "
    f"{expected}",
  )
