"""Writes sets of latents: images through an autoencoder, once, shard by shard.

A shard depends on its own images alone, is written under another name and renamed when
it is whole. So a stopped run goes on with the next shard, processes share the shards
without talking to each other, and the result is the same however often it was stopped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdt_jax.atomic import write_json
from mdt_jax.data import latents
from mdt_jax.data.sources import ImageSource
from mdt_jax.errors import SettingError

logger = logging.getLogger("mdt_jax")
# (B, H, W, 3) uint8 -> (B, 2, 2, h, w, C) in the type that is stored
EncodeFn = Callable[[np.ndarray], jax.Array]
Progress = Callable[[int], Any]

BEGUN = "begun.json"  # the card of a set that is not finished
IMAGES_A_SHARD = 10_000
# For reading at random: each record by itself; noise does not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a set will hold.

  Attributes:
    card: of the set, but for its shards.
    num_images: before any is left out.
    num_shards: images are shared out evenly, in order.
  """

  card: dict[str, Any]
  num_images: int
  num_shards: int

  @property
  def layout(self) -> latents.Layout:
    return latents.Layout(tuple(self.card["latent_shape"]), self.card["dtype"])

  @property
  def num_bytes(self) -> int:
    """About what the set takes on disk; names and ArrayRecord's own are small."""
    return self.num_images * (self.layout.moment_bytes + latents.LABEL_BYTES)

  def shard_images(self, shard: int) -> range:
    edges = np.linspace(0, self.num_images, self.num_shards + 1).round().astype(int)
    return range(edges[shard], edges[shard + 1])


def encode(
  plan: Plan,
  source: ImageSource,
  encode_fn: EncodeFn,
  output: str | Path,
  *,
  batch_size: int,
  num_threads: int = 8,
  process_index: int = 0,
  process_count: int = 1,
  progress: Progress = lambda count: None,
) -> bool:
  """Writes this process's shards; the last process to finish writes the card.

  Args:
    plan: the same in every process, and when a stopped run goes on.
    source: of the images.
    encode_fn: (batch_size, H, W, 3) uint8 -> moments of images and mirrors.
    output: folder, empty or of the same plan.
    batch_size: images at a time.
    num_threads: that read and crop images.
    process_index, process_count: shards are taken in turn.
    progress: told how many images are done, shard by shard and batch by batch.

  Returns:
    Whether the set is finished.

  Raises:
    SettingError: another set lies in `output`, or another process is at work on the
      same shard; too many unreadable images; the disk refuses; the devices have too
      little memory. Finished shards stay, and the same call goes on after them.
  """
  output = Path(output)
  if is_finished(plan, output):
    return True
  _begin(plan, output)
  for shard in range(process_index, plan.num_shards, process_count):
    indices = plan.shard_images(shard)
    path = output / latents.shard_name(shard, plan.num_shards)
    if _sidecar(path).exists() and path.exists():
      progress(len(indices))
      continue
    batches = _batches(source, indices, batch_size, num_threads)
    try:
      _write_shard(
        path, _records(plan.layout, encode_fn, batches, batch_size, progress)
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise SettingError(
        "--batch_size", batch_size, "takes more memory than the devices have"
      ) from None
    except (OSError, RuntimeError) as error:
      raise SettingError(
        "--output",
        str(output),
        f"{path.name} cannot be written ({error}); finished shards stay, and the same "
        "command goes on after them",
      ) from None
  return _finish(plan, output)


def is_finished(plan: Plan, output: str | Path) -> bool:
  """Whether `output` holds the whole set; raises where it holds another one."""
  output = Path(output)
  if not (output / latents.CARD).exists():
    return False
  card = _read_json(output, latents.CARD)
  _check_same(plan.card, card, output)
  return all(_is_whole(output, shard) for shard in card["shards"])


def bytes_missing(plan: Plan, output: str | Path) -> int:
  """What is still to be written, about, by the shards that are there."""
  names = (latents.shard_name(i, plan.num_shards) for i in range(plan.num_shards))
  paths = (Path(output) / name for name in names)
  return plan.num_bytes - sum(path.stat().st_size for path in paths if path.exists())


def check_disk(plan: Plan, output: str | Path) -> tuple[int, int]:
  """(bytes missing, bytes free); raises SettingError where they do not fit."""
  folder = Path(output).absolute()
  while not folder.exists():
    folder = folder.parent
  missing, free = bytes_missing(plan, output), shutil.disk_usage(folder).free
  if missing > free:
    raise SettingError(
      "--output",
      str(output),
      f"needs {missing / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free",
    )
  return missing, free


def verify(path: str | Path, progress: Progress = lambda count: None) -> int:
  """Compares every shard of a finished set with its checksum.

  Returns:
    The number of images.

  Raises:
    SettingError: names the first shard that differs.
  """
  card = latents.read_card(path)
  for shard in card["shards"]:
    file = Path(path) / shard["file"]
    found = _sha256(file) if file.is_file() else "none"
    if found != shard["sha256"]:
      raise SettingError(
        "--output",
        str(path),
        f"{shard['file']} has checksum {found[:12]}, where {latents.CARD} says "
        f"{shard['sha256'][:12]}; delete it, and the command that made the set makes "
        "it anew",
      )
    progress(shard["images"])
  return card["images"]


def statistics(
  source: latents.LatentSource, progress: Progress = lambda count: None
) -> dict[str, list[float]]:
  """Mean and deviation of the latents of a set, by channel, mirrors included.

  The deviation is that of draws from the posteriors: E[mean^2 + deviation^2] less the
  square of the mean.
  """
  channels = source.image_shape[-1]
  totals = np.zeros((2, channels))
  count = 0
  for index in range(len(source)):
    mean, deviation = np.moveaxis(source[index]["views"].astype(np.float64), 1, 0)
    totals[0] += mean.sum(axis=(0, 1, 2))
    totals[1] += (mean**2 + deviation**2).sum(axis=(0, 1, 2))
    count += mean.size // channels
    progress(1)
  mean, square = totals / count
  return {"mean": mean.tolist(), "deviation": np.sqrt(square - mean**2).tolist()}


def _begin(plan: Plan, output: Path) -> None:
  """Claims the folder for this plan; raises where it holds something else."""
  output.mkdir(parents=True, exist_ok=True)
  names = {path.name for path in output.iterdir() if not path.name.startswith(".")}
  if latents.CARD in names:
    _reopen(plan, output)
  elif not names:
    write_json(output / BEGUN, plan.card)
  elif BEGUN not in names:
    raise SettingError(
      "--output", str(output), "must be empty, or hold a set begun with these settings"
    )
  _check_same(plan.card, _read_json(output, BEGUN), output)


def _reopen(plan: Plan, output: Path) -> None:
  """A finished set that has lost shards becomes one that has to be gone on with."""
  shards = _read_json(output, latents.CARD)["shards"]
  write_json(output / BEGUN, plan.card)
  for shard in shards:
    if _is_whole(output, shard):
      write_json(_sidecar(output / shard["file"]), shard)
  (output / latents.CARD).unlink(missing_ok=True)


def _is_whole(output: Path, shard: dict[str, Any]) -> bool:
  path = output / shard["file"]
  return path.is_file() and path.stat().st_size == shard["bytes"]


def _read_json(output: Path, name: str) -> dict[str, Any]:
  try:
    found = json.loads((output / name).read_text())
  except (OSError, ValueError) as error:
    raise SettingError(
      "--output", str(output), f"{name} cannot be read: {error}"
    ) from None
  if not isinstance(found, dict):
    raise SettingError("--output", str(output), f"{name} must hold a dict")
  return found


def _check_same(card: dict[str, Any], found: dict[str, Any], output: Path) -> None:
  for name, value in card.items():
    if found.get(name) != json.loads(json.dumps(value)):
      raise SettingError(
        "--output",
        str(output),
        f"holds a set with {name} = {_short(found.get(name))}, not {_short(value)}: "
        "take another folder, or those settings",
      )


def _finish(plan: Plan, output: Path) -> bool:
  """Writes the card if all shards are there: whichever process sees that first."""
  paths = [
    output / latents.shard_name(shard, plan.num_shards)
    for shard in range(plan.num_shards)
  ]
  card_path = output / latents.CARD
  try:
    shards = [json.loads(_sidecar(path).read_text()) for path in paths]
  except FileNotFoundError:  # not all are there, or another process has finished
    return card_path.exists()
  images = sum(shard["images"] for shard in shards)
  write_json(card_path, {**plan.card, "images": images, "shards": shards})
  for path in [output / BEGUN, *(_sidecar(path) for path in paths)]:
    path.unlink(missing_ok=True)
  return True


def _batches(
  source: ImageSource, indices: range, batch_size: int, num_threads: int
) -> Iterator[list[tuple[np.ndarray, int, str] | str]]:
  """Images, labels and names of a shard; a name alone where an image is left out."""

  def load(index: int) -> tuple[np.ndarray, int, str] | str:
    name = source.files.name(index)
    try:
      example = source.load(index)
    except Exception as error:  # Pillow's decoders raise nearly every type.
      source.leave_out(index, error)
      return name
    return example["image"], int(example["label"]), name

  with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
    starts = range(indices.start, indices.stop, batch_size)
    waiting: list[Any] = []
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
  batches: Iterator[list[tuple[np.ndarray, int, str] | str]],
  batch_size: int,
  progress: Progress,
) -> Iterator[bytes | str]:
  """Records of a shard, and the names of images that were left out."""

  def finish(pending: tuple[Any, list, int]) -> Iterator[bytes]:
    views, read, count = pending
    for moments, (_, label, name) in zip(np.asarray(views), read, strict=False):
      if not np.isfinite(moments).all():  # one would end a training run
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
    # Filled up, so that one compilation serves all.
    images = np.resize(images, (batch_size, *images.shape[1:]))
    views = encode_fn(images)  # runs on while the batch before is written
    if pending is not None:
      yield from finish(pending)
    pending = views, read, len(batch)
  if pending is not None:
    yield from finish(pending)


def _write_shard(path: Path, records: Iterator[bytes | str]) -> None:
  """Writes a shard and, before it gets its name, what the card will say of it."""
  from array_record.python.array_record_module import ArrayRecordWriter

  partial = path.with_name(f".{path.name}.partial")
  count, left_out = 0, []
  with _claim(partial, path):
    try:
      writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
      try:
        for record in records:
          if isinstance(record, str):
            left_out.append(record)
          else:
            writer.write(record)
            count += 1
      finally:
        writer.close()
      with open(partial, "rb") as file:
        os.fsync(file.fileno())
      entry = {
        "file": path.name,
        "images": count,
        "bytes": partial.stat().st_size,
        "sha256": _sha256(partial),
        "left_out": left_out,
      }
      write_json(_sidecar(path), entry)
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _claim(partial: Path, path: Path) -> Iterator[None]:
  """Keeps other processes off a shard; one that is killed lets go of it."""
  with open(partial, "ab") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise SettingError(
        "--output",
        str(path.parent),
        f"another process is at work on {path.name}; each needs its own "
        "--process_index",
      ) from None
    except OSError as error:  # a file system without locks
      logger.warning("%s cannot be locked (%s)", path.name, error)
    yield


def _sidecar(path: Path) -> Path:
  return path.with_suffix(".json")


def _sha256(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}…"
