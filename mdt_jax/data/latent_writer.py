"""Writes the shards of a set of latents.

A shard depends on its own images alone. The writer writes it under a temporary name and
renames it when it is complete. So a stopped run goes on with the next shard, processes
share the shards without messages, and the set is the same however often the run stops.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from mdt_jax.atomic import write_json
from mdt_jax.data import latents
from mdt_jax.data.examples import Example
from mdt_jax.data.latent_set import LatentSet, entry_path
from mdt_jax.data.latents import Progress
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger

if TYPE_CHECKING:
  from mdt_jax.types import Array

# Images -> moments of images and mirror images, in the dtype of the set.
EncodeFn: TypeAlias = Callable[
  [UInt8[np.ndarray, "B H W 3"]],
  "Float[np.ndarray, 'B 2 2 h w C'] | Float[Array, 'B 2 2 h w C']",
]
# Image, label and name; or the name alone of an image that is left out.
Loaded: TypeAlias = tuple[np.ndarray, int, str] | str

IMAGES_PER_SHARD = 10_000
# For random access, one record in each chunk; compression gains nothing on noise.
WRITER_OPTIONS = "group_size:1,uncompressed"


class NamedImages(Protocol):
  """Images with names, such as `images.ImageSource`."""

  def __len__(self) -> int: ...

  @property
  def files(self) -> Any:
    """`files.name(index)` is the name that the record stores."""
    ...

  def load(self, index: int, /) -> Example:
    """Reads an image; raises any exception if it is unreadable."""
    ...

  def leave_out(self, index: int, error: Exception, /) -> None:
    """Counts an unreadable image; raises if there are too many."""
    ...


def write_latents(
  latent_set: LatentSet,
  source: NamedImages,
  encode_fn: EncodeFn,
  *,
  batch_size: int,
  num_threads: int = 8,
  process_index: int = 0,
  process_count: int = 1,
  progress: Progress = lambda count: None,
) -> bool:
  """Writes this process's shards; the last process to finish also writes the card.

  Args:
    latent_set: the set, equal in every process.
    source: of the images.
    encode_fn: encodes `batch_size` images.
    batch_size: images in a batch.
    num_threads: threads that read and crop images.
    process_index: this process writes the shards process_index,
      process_index + process_count, ….
    process_count: processes that write the set.
    progress: called with the number of further images done.

  Returns:
    Whether the set is finished.

  Raises:
    SettingError: the folder holds another set; another process writes the same shard;
      too many images are unreadable; latents are not finite; the disk is full or fails.
      Finished shards stay, and the same call goes on after them.
  """
  if latent_set.is_finished():
    return True
  latent_set.begin()
  for shard in range(process_index, latent_set.num_shards, process_count):
    indices = latent_set.shard_images(shard)
    if latent_set.has_shard(shard):
      progress(len(indices))
      continue
    batches = _batches(source, indices, batch_size, num_threads)
    records = _records(latent_set.layout, encode_fn, batches, batch_size, progress)
    _write_shard(latent_set, latent_set.shard_path(shard), records)
  return latent_set.finish()


def _batches(
  source: NamedImages, indices: range, batch_size: int, num_threads: int
) -> Iterator[list[Loaded]]:
  """Yields the images of a shard in batches, reading ahead in threads."""

  def load(index: int) -> Loaded:
    name = source.files.name(index)
    try:
      example = source.load(index)
    except Exception as error:  # Pillow's decoders raise nearly every type.
      source.leave_out(index, error)
      return name
    return example["image"], int(example["label"]), name

  with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
    starts = range(indices.start, indices.stop, batch_size)
    waiting: list[list[concurrent.futures.Future[Loaded]]] = []
    for start in starts:
      stop = min(start + batch_size, indices.stop)
      waiting.append([pool.submit(load, index) for index in range(start, stop)])
      if len(waiting) > 2:  # batches read ahead
        yield [future.result() for future in waiting.pop(0)]
    for futures in waiting:
      yield [future.result() for future in futures]


def _records(
  layout: latents.Layout,
  encode_fn: EncodeFn,
  batches: Iterator[list[Loaded]],
  batch_size: int,
  progress: Progress,
) -> Iterator[bytes | str]:
  """Yields the records of a shard, and the names of images that are left out."""

  def finish(pending: tuple[Any, list, int]) -> Iterator[bytes]:
    views, read, count = pending
    for moments, (_, label, name) in zip(np.asarray(views), read, strict=False):
      if not np.isfinite(moments).all():  # One NaN would end a training run.
        raise SettingError(
          "--dtype", layout.dtype, f"the latents of {name} are not finite in it"
        )
      yield layout.pack(moments, label, name)
    progress(count)

  pending = None
  for batch in batches:
    read = [found for found in batch if not isinstance(found, str)]
    yield from (found for found in batch if isinstance(found, str))
    if not read:
      progress(len(batch))
      continue
    images = np.stack([image for image, _, _ in read])
    # Repeats images up to the full batch: one shape compiles once.
    images = np.resize(images, (batch_size, *images.shape[1:]))
    views = encode_fn(images)  # JAX computes while the previous batch is written.
    if pending is not None:
      yield from finish(pending)
    pending = views, read, len(batch)
  if pending is not None:
    yield from finish(pending)


def _write_shard(
  latent_set: LatentSet, path: Path, records: Iterator[bytes | str]
) -> None:
  """Writes a shard, then its entry of the card, and then renames the shard."""
  from array_record.python.array_record_module import ArrayRecordWriter

  partial = path.with_name(f".{path.name}.partial")
  count, left_out = 0, []
  with _lock(latent_set, partial, path):
    try:
      with _disk_errors(latent_set, path):
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
      try:
        for record in records:
          if isinstance(record, str):
            left_out.append(record)
            continue
          with _disk_errors(latent_set, path):
            writer.write(record)
          count += 1
      finally:
        with _disk_errors(latent_set, path):
          writer.close()
      with _disk_errors(latent_set, path):
        with open(partial, "rb") as file:
          os.fsync(file.fileno())
        entry = {
          "file": path.name,
          "images": count,
          "bytes": partial.stat().st_size,
          "left_out": left_out,
        }
        write_json(entry_path(path), entry)
        os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(latent_set: LatentSet, path: Path) -> Iterator[None]:
  """Reports errors of the file system; ArrayRecord raises them as RuntimeError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise latent_set.error(
      f"{path.name} cannot be written ({error}); finished shards stay, and the same "
      "command goes on after them"
    ) from None


@contextlib.contextmanager
def _lock(latent_set: LatentSet, partial: Path, path: Path) -> Iterator[None]:
  """Locks a shard against other processes; the lock ends with the process."""
  with contextlib.ExitStack() as stack:
    with _disk_errors(latent_set, path):
      file = stack.enter_context(open(partial, "ab"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise latent_set.error(
        f"another process is at work on {path.name}; each needs its own --process_index"
      ) from None
    except OSError as error:  # a file system without locks
      logger.warning("%s cannot be locked (%s)", path.name, error)
    yield
