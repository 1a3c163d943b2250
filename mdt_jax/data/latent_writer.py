"""Writes the shards of a latent set.

A shard depends only on its own images. A shard is written under a temporary name and
renamed when complete; for a bucket, it is written to the local disk and uploaded when
complete. So a stopped run resumes at the first unfinished shard, processes need no
communication, and interruptions do not change the set.

A lock keeps two processes from writing one shard in a folder. A bucket has no such
locks. There, an object appears whole, and the process that finishes a shard later than
another one ends with an error instead of uploading the shard.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from mdt_jax import buckets
from mdt_jax.atomic import write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.data import file_names, latents
from mdt_jax.data.examples import Example, count_labels, load_patiently
from mdt_jax.data.image_arrays import Entries, ImageArrays
from mdt_jax.data.latent_records import Layout
from mdt_jax.data.latent_set import LatentSet, entry_path
from mdt_jax.data.latents import Progress
from mdt_jax.errors import DataUnavailable, SettingError, check_range
from mdt_jax.logs import logger

try:
  import fcntl
except ModuleNotFoundError:
  raise ImportError("mdt_jax needs Linux or macOS; on Windows, use WSL") from None

if TYPE_CHECKING:
  from mdt_jax.types import Array

# Images -> moments of the images and of their mirror images, in the dtype of the set.
EncodeFn: TypeAlias = Callable[
  [UInt8[np.ndarray, "B H W 3"]],
  "Float[np.ndarray, 'B 2 2 h w C'] | Float[Array, 'B 2 2 h w C']",
]
# (image, label, name, other entries), or only the name for an image that is left out.
Loaded: TypeAlias = tuple[np.ndarray, int, str, Entries] | str

IMAGES_PER_SHARD = 10_000
MAX_PROCESSES = 65_536
# One record per chunk makes random access fast. Latents do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"


class NamedImages(Protocol):
  """Interface of labelled images with names, such as `images.ImageSource`."""

  def __len__(self) -> int: ...

  @property
  def files(self) -> Any:
    """An object with name(index), the name to store in the record."""
    ...

  def load(self, index: int, /) -> Example:
    """Reads an image; raises if the image is unreadable."""
    ...

  def leave_out(self, index: int, error: Exception, /) -> None:
    """Counts an unreadable image; raises SettingError if there are too many."""
    ...


def this_process(index: int | None, count: int | None) -> tuple[int, int]:
  """Returns (index of this process, number of processes) that write a set.

  Args:
    index, count: both numbers as the user gives them; None for both: those of JAX.

  Raises:
    SettingError: setting "process_index" or "process_count": only one of the two is
      given, or a number is out of range.
  """
  if index is None and count is None:
    import jax

    # Without this test, jax.process_index() would start the devices.
    if not jax.distributed.is_initialized():
      return 0, 1
    return jax.process_index(), jax.process_count()
  if count is None:
    raise SettingError("process_count", None, "must be given with --process_index")
  if index is None:
    raise SettingError("process_index", None, "must be given with --process_count")
  check_range("process_count", count, 1, MAX_PROCESSES)
  check_range("process_index", index, 0, count - 1)
  return index, count


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
  arrays: ImageArrays | None = None,
) -> bool:
  """Writes this process's shards of a latent set.

  The process that finishes last also writes the card. After an error, finished shards
  remain, and the same call resumes after them. If there are none, nothing remains.

  Args:
    latent_set: the set, equal in every process.
    source: the images.
    encode_fn: function that encodes `batch_size` images.
    batch_size: number of images per batch.
    num_threads: number of threads that read and crop images.
    process_index: index of this process. It writes the shards process_index,
      process_index + process_count, ….
    process_count: number of processes that write the set.
    progress: called with the number of images done since the last call.
    arrays: the arrays and captions of the images; its card is a part of that of the
      set. None for none.

  Returns:
    Whether the set is finished.

  Raises:
    SettingError: an image lacks an array and such images are refused, the folder holds
      another set, another process writes the same shard, too many images are
      unreadable, latents are not finite, or writing fails, for example on a full disk.
    DataUnavailable: the machine cannot read the images now, or the bucket of the set
      does not answer.
  """
  if latent_set.is_finished():
    latent_set.remove_plan()  # left by a process that was killed while it finished
    return True
  shards = range(process_index, latent_set.num_shards, process_count)
  if arrays is not None:
    missing = [shard for shard in shards if not latent_set.has_shard(shard)]
    indices = [index for shard in missing for index in latent_set.shard_images(shard)]
    arrays.check(source.files.name(index) for index in indices)
  is_new = not latent_set.folder.exists()
  latent_set.begin()
  try:
    for shard in shards:
      indices = latent_set.shard_images(shard)
      if latent_set.has_shard(shard):
        progress(len(indices))
        continue
      batches = _batches(source, indices, batch_size, num_threads, arrays)
      records = _records(latent_set.layout, encode_fn, batches, batch_size, progress)
      _write_shard(latent_set, latent_set.shard_path(shard), records)
  except SettingError:
    latent_set.abandon()
    if is_new and isinstance(latent_set.folder, Path):
      with contextlib.suppress(OSError):  # not empty
        latent_set.folder.rmdir()
    raise
  return latent_set.finish()


def _batches(
  source: NamedImages,
  indices: range,
  batch_size: int,
  num_threads: int,
  arrays: ImageArrays | None,
) -> Iterator[list[Loaded]]:
  """Yields the images of a shard in batches; threads read ahead."""

  def load(index: int) -> Loaded:
    name = source.files.name(index)
    try:
      example = load_patiently(source.load, index, name)
    except DataUnavailable:
      raise
    except Exception as error:  # Pillow's decoders raise nearly every type.
      source.leave_out(index, error)
      return name
    image = example["image"]
    entries = Entries() if arrays is None else arrays.read(name, image)
    return name if entries is None else (image, int(example["label"]), name, entries)

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
  layout: Layout,
  encode_fn: EncodeFn,
  batches: Iterator[list[Loaded]],
  batch_size: int,
  progress: Progress,
) -> Iterator[bytes | str]:
  """Yields the records (bytes) of a shard, and the names (str) of left-out images."""

  def finish(pending: tuple[Any, list, int]) -> Iterator[bytes]:
    views, read, count = pending
    for moments, (_, label, name, entries) in zip(
      np.asarray(views), read, strict=False
    ):
      if not np.isfinite(moments).all():  # one NaN would end a training run
        raise SettingError(
          "--dtype", layout.dtype, f"the latents of {name} are not finite in this dtype"
        )
      yield layout.pack(moments, label, name, *entries)
    progress(count)

  pending = None
  for batch in batches:
    read = [found for found in batch if not isinstance(found, str)]
    yield from (found for found in batch if isinstance(found, str))
    if not read:
      progress(len(batch))
      continue
    images = np.stack([found[0] for found in read])
    # Pad to the full batch by repeating images, so that only one shape is compiled.
    images = np.resize(images, (batch_size, *images.shape[1:]))
    views = encode_fn(images)  # asynchronous: the previous batch is written meanwhile
    if pending is not None:
      yield from finish(pending)
    pending = views, read, len(batch)
  if pending is not None:
    yield from finish(pending)


def _write_shard(
  latent_set: LatentSet, path: AnyPath, records: Iterator[bytes | str]
) -> None:
  """Writes a shard and its entry of the card, then renames the shard to `path`."""
  if not isinstance(path, Path):
    _write_object(latent_set, path, records)
    return
  partial = path.with_name(f".{path.name}.partial")
  with _lock(latent_set, partial, path):
    try:
      entry = _write_records(latent_set, path, partial, records)
      with _disk_errors(latent_set, path):
        with open(partial, "rb") as file:
          os.fsync(file.fileno())
        write_json(entry_path(path), entry)
        os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


def _write_object(
  latent_set: LatentSet, path: epath.Path, records: Iterator[bytes | str]
) -> None:
  """Writes a shard to the local disk, uploads it, and then writes its entry."""
  with buckets.one_line_errors("--output", path):
    entry_path(path).unlink(missing_ok=True)  # of a shard that was deleted
  with contextlib.ExitStack() as stack:
    with _disk_errors(latent_set, path):
      # The file has no name, so nothing is left even if the process is killed.
      file = stack.enter_context(tempfile.TemporaryFile())
    partial = Path(f"/dev/fd/{file.fileno()}")
    entry = _write_records(latent_set, path, partial, records)
    with buckets.one_line_errors("--output", path):
      if entry_path(path).exists() or (path.parent / latents.CARD).exists():
        raise latent_set.error(
          f"another process has written {path.name}; each process needs its own "
          "--process_index"
        )
      buckets.upload_file(partial, path)
      write_json(entry_path(path), entry)


def _write_records(
  latent_set: LatentSet, path: AnyPath, partial: Path, records: Iterator[bytes | str]
) -> dict[str, Any]:
  """Writes the records of the shard `path` to `partial`; returns the shard's entry."""
  from array_record.python.array_record_module import ArrayRecordWriter

  labels: list[int] = []
  left_out: list[str] = []
  with _disk_errors(latent_set, path):
    writer = ArrayRecordWriter(file_names.from_path(str(partial)), WRITER_OPTIONS)
  try:
    for record in records:
      if isinstance(record, str):
        left_out.append(record)
        continue
      with _disk_errors(latent_set, path):
        writer.write(record)
      labels.append(latent_set.layout.label(record))
  finally:
    with _disk_errors(latent_set, path):
      writer.close()
  return {
    "file": path.name,
    "images": len(labels),
    "bytes": partial.stat().st_size,
    "labels": count_labels(np.asarray(labels, int)),
    "left_out": left_out,
  }


@contextlib.contextmanager
def _disk_errors(latent_set: LatentSet, path: AnyPath) -> Iterator[None]:
  """Turns errors of the file system and of ArrayRecord into a SettingError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise latent_set.error(
      f"{path.name} cannot be written ({error}); finished shards remain, and the same "
      "command resumes after them"
    ) from None


@contextlib.contextmanager
def _lock(latent_set: LatentSet, partial: Path, path: Path) -> Iterator[None]:
  """Locks a shard against other processes; the lock is released with the process."""
  with contextlib.ExitStack() as stack:
    with _disk_errors(latent_set, path):
      file = stack.enter_context(open(partial, "ab"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise latent_set.error(
        f"another process writes {path.name}; each process needs its own "
        "--process_index"
      ) from None
    except OSError as error:  # a file system without locks
      logger.warning("%s cannot be locked (%s)", path.name, error)
    yield
