"""The format of latent sets, and reading them; `latent_writer` writes them.

A latent set is a folder of ArrayRecord shards, latents-00000-of-00064.array_record, …,
and a card.json that describes the set. A record holds the moments (mean and standard
deviation) of the latents of an image and of its mirror image, shifted and scaled to
about unit variance, with label and name. A record may also hold arrays for conditions,
and a caption; see `latent_records.Layout`.

Damage is detected in three ways:
- ArrayRecord stores a hash of each record, of each header and of the index of a shard,
  and raises RuntimeError if a hash differs. Only padding and a 64-byte file signature
  have no hash; no reader uses them.
- `LatentSource` compares size and record count of each shard with the card.
- `verify` reads all records, and finds a shard that is a copy of another shard.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Float64

from mdt_jax.buckets import bucket_path, is_bucket
from mdt_jax.data import file_names, latent_cache
from mdt_jax.data.bucket_shards import BucketRecords
from mdt_jax.data.examples import (
  Example,
  SourceArguments,
  TolerantSource,
  shape_error,
)
from mdt_jax.data.latent_card import CARD, read_card
from mdt_jax.data.latent_records import Layout
from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.paths import expand_home
from mdt_jax.sizes import Size, height_width

Progress = Callable[[int], Any]  # called with the number of newly done images


class Records(Protocol):
  """The records of all shards of a set, in order."""

  def __getitem__(self, index: int, /) -> bytes: ...


def shard_name(index: int, count: int) -> str:
  """Returns the file name of shard `index` in [0, count)."""
  return f"latents-{index:05d}-of-{count:05d}.array_record"


class LatentSource(TolerantSource):
  """A source that reads a finished latent set.

  The entry "views" of an example is float16 or bfloat16 (2, 2, H, W, C). Axis 0 is the
  image or its mirror image; axis 1 is mean or standard deviation of its latents.
  `transforms.random_flip` chooses between image and mirror image. The training step
  draws the latents from the moments on the device. The arrays of the set are further
  entries; the entry "caption" of a set with captions is a str, "" for none.

  Args:
    path: output folder of `mdt_jax.encode`. From a folder in a bucket, only reading in
      order is fast; see `bucket_shards.BucketRecords`.
    input_size: height and width of the latents, see `mdt_jax.sizes`.
    channels: number of channels of the latents.
    max_unreadable: largest accepted number of unreadable records.

  Raises:
    SettingError: `path` holds no finished set, the latents have another shape, or a
      shard is missing, damaged, or differs from the card in size or record count.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    input_size: Size,
    channels: int,
    max_unreadable: int,
  ):
    super().__init__(str(path), max_unreadable)
    self.card = read_card(path)
    self.image_shape = (*height_width(input_size, "input_size"), channels)
    self.layout = Layout.of_card(self.card)
    _check_shape(self._path, self.card, self.image_shape)
    self.class_names = self.card["classes"]
    self.num_classes = len(self.class_names)
    shards = self.card["shards"]
    self.label_counts = _label_counts(shards)
    self._records = _open_records(self._path, shards)
    self._ends = np.cumsum([shard["images"] for shard in shards])

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def array_names(self) -> tuple[str, ...]:
    """Names of the arrays of the examples."""
    return tuple(field.name for field in self.layout.arrays)

  @property
  def has_captions(self) -> bool:
    """Whether the set holds captions."""
    return self.layout.has_captions

  def caption(self, index: int) -> str | None:
    """Returns the caption of an image; None if there is none."""
    return self.layout.unpack_caption(self.record(index))

  def name(self, index: int) -> str:
    shard, record = self.locate(index)
    return f"record {record} of {os.path.join(self._path, shard)}"

  def locate(self, index: int) -> tuple[str, int]:
    """Returns (file name of the shard, index of the record in the shard)."""
    shard = int(np.searchsorted(self._ends, index, side="right"))
    start = int(self._ends[shard - 1]) if shard else 0
    return self.card["shards"][shard]["file"], index - start

  def read(self, index: int) -> tuple[Float[np.ndarray, "2 2 H W C"], int, str]:
    """Returns (views, label, name) of a record; raises if the record is damaged."""
    return self.unpack(self.record(index))

  def load(self, index: int) -> Example:
    """Returns the entries of a record; raises if the record is damaged."""
    record = self.record(index)
    views, label, _ = self.unpack(record)
    arrays = self.layout.unpack_arrays(record)
    example = {"views": views, "label": np.int32(label), **arrays}
    if self.has_captions:
      example["caption"] = self.layout.unpack_caption(record) or ""
    return example

  def record(self, index: int) -> bytes:
    """Returns the bytes of a record; raises if its hash differs."""
    return self._records[index]

  def unpack(self, record: bytes) -> tuple[Float[np.ndarray, "2 2 H W C"], int, str]:
    """Returns (views, label, name); raises ValueError if the label is out of range."""
    views, label, name = self.layout.unpack(record)
    if not 0 <= label < self.num_classes:
      raise ValueError(f"label {label} must lie in [0, {self.num_classes})")
    return views, label, name


def open_latents(arguments: SourceArguments) -> LatentSource:
  """Opens a latent set; `image_size` and `channels` refer to the latents.

  A set in a bucket is copied to `cache` first; see `latent_cache`.
  """
  path: str | Path = arguments.path
  if is_bucket(path):
    shape = (*height_width(arguments.image_size, "input_size"), arguments.channels)
    _check_shape(arguments.path, read_card(path), shape)
    path = latent_cache.copy_set(path, arguments.cache)
  return LatentSource(
    path, arguments.image_size, arguments.channels, arguments.max_unreadable
  )


def open_set(path: str | os.PathLike[str], max_unreadable: int = 0) -> LatentSource:
  """Opens a latent set of any shape; arguments as for `LatentSource`."""
  height, width, channels = read_card(path)["latent_shape"]
  return LatentSource(path, (height, width), channels, max_unreadable)


def verify(
  path: str | os.PathLike[str], progress: Progress = lambda count: None
) -> int:
  """Reads and checks all records of a finished set.

  The checks: ArrayRecord's hash of each record, sizes and record counts of the shards,
  labels, finite moments and arrays, captions in UTF-8, and that no shard is a copy of
  another shard.

  Args:
    path: folder of the set.
    progress: called with the number of records read since the last call.

  Returns:
    The number of images.

  Raises:
    SettingError: a shard or a record is missing or damaged; the message names the first
      one.
    DataUnavailable: the bucket of the set does not answer.
  """
  source = open_set(path)
  first_names: dict[str, str] = {}  # name of the first image of a shard -> shard
  for index in range(len(source)):
    shard, record = source.locate(index)
    try:
      record_bytes = source.record(index)
      views, _, name = source.unpack(record_bytes)
      if not np.isfinite(views).all():
        raise ValueError("its moments are not finite")
      for array_name, array in source.layout.unpack_arrays(record_bytes).items():
        if not np.isfinite(array).all():
          raise ValueError(f"its array {array_name} is not finite")
      source.layout.unpack_caption(record_bytes)  # raises if it is not UTF-8
      if record == 0 and (other := first_names.setdefault(name, shard)) != shard:
        raise ValueError(f"it begins with the same image as {other}")
    except DataUnavailable:
      raise
    except Exception as error:
      raise SettingError(
        "config.data.path",
        str(path),
        f"record {record} of {shard} is damaged ({error}); delete {shard} and run the "
        "same mdt_jax.encode command again to rewrite it",
      ) from None
    progress(1)
  return len(source)


class ChannelStatistics(NamedTuple):
  """Mean and standard deviation of latents, per channel."""

  mean: Float64[np.ndarray, " C"]
  std: Float64[np.ndarray, " C"]


def channel_statistics(
  views: Iterable[Float[np.ndarray, "2 2 H W C"]],
) -> ChannelStatistics:
  """Computes the channel statistics of latents, including mirror images.

  The standard deviation is that of latents z drawn from the posteriors:
  Var[z] = E[mean^2 + std^2] - E[mean]^2.

  Args:
    views: moments of at least one image and of its mirror image; axis 1 is mean, std.
  """
  total: Any = 0
  square: Any = 0
  count = 0
  for moments in views:
    mean, std = np.moveaxis(moments.astype(np.float64), 1, 0)
    total += mean.sum(axis=(0, 1, 2))
    square += (mean**2 + std**2).sum(axis=(0, 1, 2))
    count += mean[..., 0].size
  mean = total / count
  variance = square / count - mean**2
  return ChannelStatistics(mean, np.sqrt(np.maximum(variance, 0)))


def _label_counts(shards: list[dict[str, Any]]) -> dict[int, int] | None:
  """Returns label -> number of images; None for a card of an earlier version."""
  if not all("labels" in shard for shard in shards):
    return None
  counts: collections.Counter[int] = collections.Counter()
  for shard in shards:
    counts.update({int(label): count for label, count in shard["labels"].items()})
  return dict(counts)


def _check_shape(
  path: str, card: dict[str, Any], expected: tuple[int, int, int]
) -> None:
  """Raises SettingError if the latents of a set have another shape."""
  if (found := tuple(card["latent_shape"])) != expected:
    raise shape_error(path, found, expected)


def _open_records(path: str, shards: list[dict[str, Any]]) -> Records:
  """Opens the shards of a set in a folder or in a bucket."""
  if is_bucket(path):
    return BucketRecords(bucket_path("config.data.path", path), shards)
  return _open_shards(expand_home(path), shards)


def _open_shards(folder: Path, shards: list[dict[str, Any]]) -> Records:
  """Opens all shards; raises SettingError if a shard differs from the card."""
  import grain
  from array_record.python.array_record_module import ArrayRecordReader

  def refuse(text: str) -> SettingError:
    return SettingError("config.data.path", str(folder), text)

  if not file_names.is_utf8(str(folder)):
    raise refuse("must be a path in UTF-8: ArrayRecord opens no others")
  for shard in shards:
    path = folder / shard["file"]
    if not path.is_file():
      raise refuse(f"{path.name} is missing")
    size = path.stat().st_size
    if size != shard["bytes"]:
      raise refuse(f"{path.name} must have {shard['bytes']} bytes ({CARD}), has {size}")
    try:
      reader = ArrayRecordReader(file_names.from_path(str(path)))
      count = reader.num_records()
      reader.close()
    except RuntimeError as error:  # a damaged index
      raise refuse(f"{path.name} is damaged ({error})") from None
    if count != shard["images"]:
      raise refuse(
        f"{path.name} must hold {shard['images']} records ({CARD}), holds {count}"
      )
  paths = [file_names.from_path(str(folder / shard["file"])) for shard in shards]
  return grain.sources.ArrayRecordDataSource(paths)
