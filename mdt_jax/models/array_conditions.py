"""Conditions that are arrays of the data: vectors, sequences of tokens, or several.

The arrays come from any encoder of text, images or measurements; each class reads its
array from a batch by name. All keep y in one float32 array, whose leading axis is that
of the samples, so that y is stored, sharded and joined as labels are.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mdt_jax.errors import SettingError
from mdt_jax.models.condition_layers import (
  Embedded,
  TokensEmbed,
  VectorEmbed,
  add_embedded,
)
from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.types import RESERVED_NAMES, Array, Dtype

MAX_SIZE = 2**20  # largest S and V
MASK_SUFFIX = "_mask"  # NAME_mask (S,) says which tokens of NAME (S, V) are no padding


class _Drop(nn.Module):
  """Drops conditions in a network that is applied with train=True; no parameters."""

  condition: Condition

  @nn.compact
  def __call__(self, y: Array) -> Array:
    return self.condition.drop(self.make_rng("label_dropout"), y, 1)[:, 0]


class ArrayCondition(Condition):
  """Base class of the conditions in this file.

  Attributes (of subclasses):
    dropout: see `Condition`.
  """

  def embedder(self, hidden_size: int, dtype: Dtype) -> Callable[..., Array | Embedded]:
    """Returns a function (y, train=False) -> (B, D), or `Embedded` with tokens."""

    def embed(y: Array, train: bool = False) -> Array | Embedded:
      if train and self.dropout > 0:
        y = _Drop(self)(y)
      return self._embed(y, hidden_size, dtype)

    return embed

  def null_like(self, y: Array) -> Array:
    """Returns null conditions; raises ValueError if `dropout` is 0."""
    if self.dropout == 0:
      raise ValueError("the network has no null condition: its dropout is 0")
    return self._null(y)

  def drop(self, key: Array, y: Array, count: int) -> Array:
    """Copies y for `count` passes; see `Condition.drop`."""
    copies = jnp.stack([y] * count, axis=1)  # (B, count, …)
    if self.dropout == 0:
      return copies
    dropped = jax.random.bernoulli(key, self.dropout, copies.shape[:2])
    dropped = dropped.reshape(dropped.shape + (1,) * (y.ndim - 1))
    return jnp.where(dropped, self._null(copies), copies)

  @abc.abstractmethod
  def _embed(self, y: Array, hidden_size: int, dtype: Dtype) -> Array | Embedded:
    """Embeds y inside the network's compact `__call__`."""

  def _null(self, y: Array) -> Array:
    """Returns null conditions like y, which may have more leading axes."""
    return jnp.zeros_like(y)

  def choose(self, count: int) -> np.ndarray:
    """Returns null conditions: an array condition has no values of its own."""
    return np.zeros_like(self.dummy(count))


@dataclasses.dataclass(frozen=True)
class VectorCondition(ArrayCondition):
  """A vector of each sample, from the array `name` of the data.

  y is (B, V + 1) float32: the vector and 1, or zeros for the null condition.

  Attributes:
    name: name of the array (V,) in an example.
    size: V.
    dropout: see `Condition`.
    norm: see `VectorEmbed`.
  """

  name: str
  size: int
  dropout: float
  norm: bool = True

  def of_batch(self, batch: Mapping[str, Any]) -> Float[Array, "B V+1"]:
    """Returns y of batch[name] (B, V); raises ValueError for another form."""
    vector = _floats(batch, self.name, (self.size,))
    return jnp.pad(vector, ((0, 0), (0, 1)), constant_values=1)

  def arrays(self) -> dict[str, tuple[int, ...]]:
    return {self.name: (self.size,)}

  def kind_of(self, name: str) -> str:
    return "vector"

  def dummy(self, batch: int) -> Float[Array, "B V+1"]:
    """Returns ones (batch, V + 1)."""
    return jnp.ones((batch, self.size + 1))

  def check(self) -> None:
    _check_name("vector", self.name)
    smallest = 2 if self.norm else 1
    accepted = f"must lie in [{smallest}, {MAX_SIZE}]: the length of the array "
    accepted += repr(self.name)
    if self.norm:
      accepted += "; LayerNorm makes one number 0, see vector_norm"
    if not smallest <= self.size <= MAX_SIZE:
      raise SettingError("vector_size", self.size, accepted)

  def embedding_flops(self, hidden_size: int) -> int:
    return 2 * (self.size * hidden_size + hidden_size**2)

  def _embed(self, y: Array, hidden_size: int, dtype: Dtype) -> Array:
    has_null = self.dropout > 0
    return VectorEmbed(hidden_size, has_null, self.norm, dtype, name="vector_embed")(y)


@dataclasses.dataclass(frozen=True)
class TokensCondition(ArrayCondition):
  """A sequence of tokens of each sample, from the array `name` of the data.

  The blocks attend to the tokens, and their mean joins the timestep's embedding. y is
  (B, S, V + 1) float32: each token and 1, zeros for padding. The null condition has no
  tokens.

  Attributes:
    name: name of the array (S, V) in an example. The array NAME_mask (S,), if there is
      one, is above 0 where a token is no padding.
    length: S.
    size: V.
    dropout: see `Condition`.
  """

  name: str
  length: int
  size: int
  dropout: float

  @property
  def num_tokens(self) -> int:
    return self.length

  def of_batch(self, batch: Mapping[str, Any]) -> Float[Array, "B S V+1"]:
    """Returns y of batch[name] (B, S, V); raises ValueError for another form."""
    tokens = _floats(batch, self.name, (self.length, self.size))
    mask = jnp.ones(tokens.shape[:2])
    if (mask_name := self.name + MASK_SUFFIX) in batch:
      mask = jnp.asarray(batch[mask_name])
      if mask.shape != tokens.shape[:2]:
        expected = f"(B, {self.length})"
        raise ValueError(f"{mask_name} must be {expected}, got {mask.shape}")
    mask = (mask > 0).astype(jnp.float32)[..., None]
    return jnp.concatenate([jnp.where(mask > 0, tokens, 0), mask], axis=-1)

  def arrays(self) -> dict[str, tuple[int, ...]]:
    return {self.name: (self.length, self.size)}

  def optional_arrays(self) -> dict[str, tuple[int, ...]]:
    return {self.name + MASK_SUFFIX: (self.length,)}

  def kind_of(self, name: str) -> str:
    return "tokens"

  def dummy(self, batch: int) -> Float[Array, "B S V+1"]:
    """Returns ones (batch, S, V + 1)."""
    return jnp.ones((batch, self.length, self.size + 1))

  def check(self) -> None:
    _check_name("tokens", self.name)
    for setting, value in (("tokens_length", self.length), ("tokens_size", self.size)):
      if not 1 <= value <= MAX_SIZE:
        accepted = f"must lie in [1, {MAX_SIZE}]: the array {self.name!r} is "
        accepted += "(length, size)"
        raise SettingError(setting, value, accepted)

  def embedding_flops(self, hidden_size: int) -> int:
    of_token = self.size * hidden_size + hidden_size**2
    return 2 * (self.length * of_token + hidden_size**2)

  def _embed(self, y: Array, hidden_size: int, dtype: Dtype) -> Embedded:
    return TokensEmbed(hidden_size, self.dropout > 0, dtype, name="tokens_embed")(y)


@dataclasses.dataclass(frozen=True)
class JointCondition(ArrayCondition):
  """Several conditions at once; their embeddings are added.

  y is (B, P) float32: the y of all parts, flattened and joined.

  Attributes:
    parts: the conditions, of which one at most has tokens.
    together: whether a sample loses all its conditions or none, with the probability
      `dropout`. If False, each part is dropped alone, with its own probability.
  """

  parts: tuple[Condition, ...]
  together: bool = True

  @property
  def dropout(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
    """Probability of a drop, the largest of the parts.

    The null condition keeps the parts that are never dropped.
    """
    return max(part.dropout for part in self.parts)

  @property
  def label(self) -> LabelCondition | None:
    labels = [part.label for part in self.parts if part.label is not None]
    return labels[0] if labels else None

  @property
  def num_tokens(self) -> int:
    return max(part.num_tokens for part in self.parts)

  def of_batch(self, batch: Mapping[str, Any]) -> Float[Array, "B P"]:
    """Returns y of the arrays of all parts; see `of_batch` of the parts."""
    return self.join([part.of_batch(batch) for part in self.parts])

  def arrays(self) -> dict[str, tuple[int, ...]]:
    return {n: s for part in self.parts for n, s in part.arrays().items()}

  def optional_arrays(self) -> dict[str, tuple[int, ...]]:
    return {n: s for part in self.parts for n, s in part.optional_arrays().items()}

  def kind_of(self, name: str) -> str:
    for part in self.parts:
      if name in part.arrays() or name in part.optional_arrays():
        return part.kind_of(name)
    return name

  def join(self, parts: list[Any], lead: int = 1) -> Float[Array, "*lead P"]:
    """Joins the y of the parts, which have `lead` leading axes in common."""
    flat = [y.reshape(*y.shape[:lead], -1).astype(jnp.float32) for y in parts]
    return jnp.concatenate(flat, axis=-1)

  def split(self, y: Float[Array, "*lead P"]) -> list[Array]:
    """Returns the y of each part; the inverse of `join`."""
    found, start = [], 0
    for part in self.parts:
      like = jax.eval_shape(lambda part=part: part.dummy(1))
      size = math.prod(like.shape[1:])
      values = y[..., start : start + size].reshape(*y.shape[:-1], *like.shape[1:])
      found.append(values.astype(like.dtype))
      start += size
    return found

  def dummy(self, batch: int) -> Float[Array, "B P"]:
    """Returns the joined `dummy` of the parts."""
    return self.join([part.dummy(batch) for part in self.parts])

  def drop(self, key: Array, y: Array, count: int) -> Array:
    """Copies y for `count` passes, and drops the parts together or each alone."""
    if self.together:
      return super().drop(key, y, count)
    dropped = [
      part.drop(jax.random.fold_in(key, i), value, count)
      for i, (part, value) in enumerate(zip(self.parts, self.split(y), strict=True))
    ]
    return self.join(dropped, lead=2)

  def check(self) -> None:
    for part in self.parts:
      part.check()
    names = [
      n for part in self.parts for n in (*part.arrays(), *part.optional_arrays())
    ]
    for name in names:
      if names.count(name) > 1:
        accepted = "must name another array than the other conditions and their masks"
        raise SettingError(self.kind_of(name), name, accepted)

  def embedding_flops(self, hidden_size: int) -> int:
    return sum(part.embedding_flops(hidden_size) for part in self.parts)

  def _embed(self, y: Array, hidden_size: int, dtype: Dtype) -> Array | Embedded:
    embedded = [
      part.embedder(hidden_size, dtype)(value, False)
      for part, value in zip(self.parts, self.split(y), strict=True)
    ]
    return functools.reduce(add_embedded, embedded)

  def _null(self, y: Array) -> Array:
    nulls = [
      part.null_like(value) if part.dropout > 0 else value
      for part, value in zip(self.parts, self.split(y), strict=True)
    ]
    return self.join(nulls, lead=y.ndim - 1)


def _check_name(setting: str, name: str) -> None:
  """Raises SettingError if an array has a name that examples use for other things."""
  if not name or name in RESERVED_NAMES:
    accepted = f"must name an array of the data, not {', '.join(RESERVED_NAMES)}"
    raise SettingError(setting, name, accepted)


def _floats(
  batch: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> Float[Array, "B ..."]:
  """Returns an array of a batch as float32; raises ValueError for another form."""
  if name not in batch:
    raise ValueError(f"the batch holds no {name!r}, but {', '.join(sorted(batch))}")
  found = jnp.asarray(batch[name])
  if found.shape[1:] != shape or found.ndim != len(shape) + 1:
    expected = ("B", *shape)
    raise ValueError(f"{name!r} must have the shape {expected}, has {found.shape}")
  return found.astype(jnp.float32)
