"""The binary layout of the records of a latent set; docs/data.md describes it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdt_jax.data import file_names
from mdt_jax.data.latent_card import DTYPES

LABEL_BYTES = 4
CAPTION_BYTES = 4  # of the length of a caption


class ArrayField(NamedTuple):
  """An array that each record holds beside the moments.

  Attributes:
    name: name of the array, the entry of an example.
    shape: shape of the array of one image.
    dtype: name of the dtype, one of `latent_card.ARRAY_DTYPES`; little-endian.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    """Size of the array in bytes."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  def to_bytes(self, array: np.ndarray) -> bytes:
    """Returns the bytes of an array, which must have this shape."""
    return array.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()

  def from_bytes(self, record: bytes, start: int) -> np.ndarray:
    """Returns the array whose bytes begin at `start`."""
    dtype = np.dtype(self.dtype).newbyteorder("<")
    found = np.frombuffer(record, dtype, math.prod(self.shape), start)
    return found.reshape(self.shape).astype(self.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The layout of a record: moments, label, arrays, caption, name.

  Attributes:
    latent_shape: (H, W, C).
    dtype: dtype of the moments, "float16" or "bfloat16"; little-endian.
    arrays: the arrays, in the order of the record.
    has_captions: whether records hold captions.
  """

  latent_shape: tuple[int, int, int]
  dtype: str
  arrays: tuple[ArrayField, ...] = ()
  has_captions: bool = False

  @classmethod
  def of_card(cls, card: Mapping[str, Any]) -> Layout:
    """Returns the layout that a checked card describes."""
    arrays = tuple(
      ArrayField(name, tuple(array["shape"]), array["dtype"])
      for name, array in card.get("arrays", {}).items()
    )
    return cls(tuple(card["latent_shape"]), card["dtype"], arrays, "captions" in card)

  @functools.cached_property
  def shape(self) -> tuple[int, ...]:
    """(2, 2, H, W, C); axis 0: image, mirror image; axis 1: mean, std."""
    return (2, 2, *self.latent_shape)

  @functools.cached_property
  def moment_bytes(self) -> int:
    """Size of the moments in bytes."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  @functools.cached_property
  def fixed_bytes(self) -> int:
    """Size of moments, label and arrays in bytes."""
    arrays = sum(field.num_bytes for field in self.arrays)
    return self.moment_bytes + LABEL_BYTES + arrays

  def pack(
    self,
    views: Float[np.ndarray, "2 2 H W C"],
    label: int,
    name: str,
    arrays: Sequence[np.ndarray] = (),
    caption: str | None = None,
  ) -> bytes:
    """Packs a record.

    Args:
      views: the moments, in the shape and dtype of this layout.
      label: the label.
      name: name of the image.
      arrays: the arrays of `self.arrays`, in this order.
      caption: the caption; None or "" for none. Ignored without `has_captions`.
    """
    parts = [views.tobytes(), int(label).to_bytes(LABEL_BYTES, "little")]
    for field, array in zip(self.arrays, arrays, strict=True):
      parts.append(field.to_bytes(array))
    if self.has_captions:
      text = (caption or "").encode()
      parts += [len(text).to_bytes(CAPTION_BYTES, "little"), text]
    return b"".join([*parts, file_names.to_bytes(name)])

  def label(self, record: bytes) -> int:
    """Returns the label of a record."""
    end = self.moment_bytes + LABEL_BYTES
    return int.from_bytes(record[self.moment_bytes : end], "little")

  def unpack(self, record: bytes) -> tuple[Float[np.ndarray, "2 2 H W C"], int, str]:
    """Returns (views, label, name); raises ValueError if the record is truncated."""
    name = file_names.from_bytes(record[self._caption_span(record)[1] :])
    views = np.frombuffer(record, DTYPES[self.dtype], math.prod(self.shape))
    return views.reshape(self.shape), self.label(record), name

  def unpack_arrays(self, record: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a record that `unpack` accepts, by name."""
    found = {}
    start = self.moment_bytes + LABEL_BYTES
    for field in self.arrays:
      found[field.name] = field.from_bytes(record, start)
      start += field.num_bytes
    return found

  def unpack_caption(self, record: bytes) -> str | None:
    """Returns the caption; None if there is none. Raises ValueError if damaged."""
    start, end = self._caption_span(record)
    return record[start:end].decode() or None

  def _caption_span(self, record: bytes) -> tuple[int, int]:
    """Returns where the caption begins and ends; without one, both are equal."""
    start = self.fixed_bytes + CAPTION_BYTES * self.has_captions
    end = start
    if self.has_captions and len(record) >= start:
      end += int.from_bytes(record[self.fixed_bytes : start], "little")
    if len(record) < end:
      raise ValueError(f"record has {len(record)} bytes, must have at least {end}")
    return start, end
