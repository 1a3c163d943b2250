"""Sets of latents on disk: ArrayRecord shards and a card.

A folder holds latents-00000-of-00064.array_record, … and card.json, which says what is
in them and how they were made. A record holds the moments of the latents of an image
and of its mirror, as a diffusion sees them (shifted and scaled), its label and name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mdt_jax.data.sources import TolerantSource, shape_error
from mdt_jax.errors import SettingError, check_choice

FORMAT = "mdt_jax latents 1"
CARD = "card.json"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LABEL_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Layout:
  """How records are laid out: moments, label, name.

  Attributes:
    latent_shape: (H, W, C).
    dtype: "float16" or "bfloat16", little-endian.
  """

  latent_shape: tuple[int, int, int]
  dtype: str

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    """(image or mirror, mean or deviation, H, W, C)."""
    return (2, 2, *self.latent_shape)

  @functools.cached_property
  def moment_bytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  def pack(self, views: np.ndarray, label: int, name: str) -> bytes:
    """A record of `views`, of this shape and dtype."""
    label_bytes = int(label).to_bytes(LABEL_BYTES, "little")
    return views.tobytes() + label_bytes + name.encode()

  def unpack(self, record: bytes) -> tuple[np.ndarray, int, str]:
    """Views, label and name; raises ValueError for a record that is cut short."""
    end = self.moment_bytes + LABEL_BYTES
    if len(record) < end:
      raise ValueError(f"record of {len(record)} bytes, where {end} are expected")
    views = np.frombuffer(record, DTYPES[self.dtype], math.prod(self.shape))
    label = int.from_bytes(record[self.moment_bytes : end], "little")
    return views.reshape(self.shape), label, record[end:].decode()


def shard_name(index: int, count: int) -> str:
  return f"latents-{index:05d}-of-{count:05d}.array_record"


def read_card(path: str | Path) -> dict[str, Any]:
  """The card of a finished set; raises SettingError where there is none."""
  card = Path(path).expanduser() / CARD
  try:
    found = json.loads(card.read_text())
  except FileNotFoundError:
    raise SettingError(
      "config.data.path",
      str(path),
      f"holds no {CARD}: must be a finished output of python -m mdt_jax.encode",
    ) from None
  except (OSError, ValueError) as error:
    raise SettingError(
      "config.data.path", str(path), f"{CARD} cannot be read: {error}"
    ) from None
  if not isinstance(found, dict) or found.get("format") != FORMAT:
    raise SettingError("config.data.path", str(path), f"{CARD} is not of {FORMAT!r}")
  return found


class LatentSource(TolerantSource):
  """A set of latents.

  An example holds "views" (2, 2, H, W, C), float16 or bfloat16: mean and deviation of
  the latents of the image and of its mirror. `transforms.random_flip` chooses one, and
  the training step draws the latent from it, on the device.

  Args:
    path: folder of `mdt_jax.encode`.
    input_size: the model's.
    channels: the model's.
    max_unreadable: how many records may be unreadable.

  Raises:
    SettingError: no set, one of latents of another shape, or one whose shards are not
      those of its card.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    input_size: int,
    channels: int,
    max_unreadable: int,
  ):
    super().__init__(str(path), max_unreadable)
    self.card = read_card(path)
    self.image_shape = (input_size, input_size, channels)
    self.layout = Layout(tuple(self.card["latent_shape"]), self.card["dtype"])
    check_choice("config.data.path: dtype", self.layout.dtype, DTYPES)
    if self.layout.latent_shape != self.image_shape:
      raise shape_error(self._path, self.layout.latent_shape, self.image_shape)
    self.num_classes = len(self.card["classes"])
    shards = self.card["shards"]
    self._records = _open_shards(Path(self._path).expanduser(), shards)
    self._ends = np.cumsum([shard["images"] for shard in shards])

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    shard = int(np.searchsorted(self._ends, index, side="right"))
    start = self._ends[shard - 1] if shard else 0
    file = self.card["shards"][shard]["file"]
    return f"record {index - start} of {os.path.join(self._path, file)}"

  def load(self, index: int) -> dict[str, np.ndarray]:
    views, label, _ = self.layout.unpack(self._records[index])
    if not 0 <= label < self.num_classes:
      raise ValueError(f"label {label}, where there are {self.num_classes} classes")
    return {"views": views, "label": np.int32(label)}


def _open_shards(folder: Path, shards: list[dict[str, Any]]) -> Any:
  """A random-access view of all records; raises for shards unlike their card."""
  import grain
  from array_record.python.array_record_module import ArrayRecordReader

  for shard in shards:
    path = folder / shard["file"]
    if not path.is_file():
      raise SettingError("config.data.path", str(folder), f"misses {shard['file']}")
    if path.stat().st_size != shard["bytes"]:
      raise SettingError(
        "config.data.path",
        str(folder),
        f"{shard['file']} has {path.stat().st_size} bytes, where {CARD} says "
        f"{shard['bytes']}",
      )
    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    if count != shard["images"]:
      raise SettingError(
        "config.data.path",
        str(folder),
        f"{shard['file']} holds {count} records, where {CARD} says {shard['images']}",
      )
  return grain.sources.ArrayRecordDataSource([str(folder / s["file"]) for s in shards])
