"""Conditions of a network, such as class labels.

A condition defines how y is read from a batch, embedded, and dropped for
classifier-free guidance. This file holds the interface, and the conditions of released
networks; `array_conditions` holds vectors and tokens. To add one, write a subclass of
`Condition` and add it to CONDITIONS.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mdt_jax.models.embeddings import (
  LabelEmbed,
  PooledCaption,
  drop_captions,
  drop_labels,
)
from mdt_jax.types import Array, Dtype


class Condition(abc.ABC):
  """Interface of a condition y. Subclasses are frozen, hashable dataclasses.

  Attributes:
    dropout: probability, in [0, 1), of replacing an example's condition by the null
      condition in training, for classifier-free guidance. If 0, the network has no null
      condition.
  """

  dropout: float

  @property
  def num_tokens(self) -> int:
    """S, number of tokens that the blocks attend to; 0 for a condition without."""
    return 0

  @property
  def label(self) -> LabelCondition | None:
    """The class label that is this condition, or a part of it; None without one."""
    return None

  def arrays(self) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the float arrays that an example must hold.

    The entry "label" of an example is not listed. The default is none, which leaves the
    examples of a condition of your own unchecked.
    """
    return {}

  def optional_arrays(self) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the arrays that an example may hold."""
    return {}

  def kind_of(self, name: str) -> str:
    """Returns the setting of `config.condition` that names an array."""
    return name

  def check(self) -> None:  # noqa: B027
    """Raises SettingError if an attribute is invalid."""

  def embedding_flops(self, hidden_size: int) -> int:
    """Counts the operations of the embedding of a condition; see `models.flops`."""
    del hidden_size
    return 0

  @abc.abstractmethod
  def of_batch(self, batch: Mapping[str, Any]) -> Array:
    """Returns y (B, …) of a training batch.

    Args:
      batch: name -> array with leading axis B.

    Raises:
      ValueError: the batch holds values that cannot be embedded.
    """

  @abc.abstractmethod
  def embedder(self, hidden_size: int, dtype: Dtype) -> Callable[..., Any]:
    """Returns a module, or a function, that maps (y (B, …), train) to (B, D).

    Call it inside the network's compact `__call__`. A condition with `num_tokens` above
    0 is mapped to `condition_layers.Embedded` instead.

    Args:
      hidden_size: D, width of the network.
      dtype: dtype of the embedding.
    """

  @abc.abstractmethod
  def drop(self, key: Array, y: Array, count: int) -> Array:
    """Copies y for `count` passes and drops each copy independently.

    Args:
      key: random key.
      y: (B, …).
      count: number of passes of the network over the same examples.

    Returns:
      (B, count, …), of the dtype of `y`. Dropped entries hold the null condition.
    """

  @abc.abstractmethod
  def null_like(self, y: Array) -> Array:
    """Returns the null condition in the shape (B, …) and dtype of `y`.

    Raises:
      ValueError: `dropout` is 0, so the network has no null condition.
    """

  @abc.abstractmethod
  def dummy(self, batch: int) -> Array:
    """Returns an arbitrary valid y (batch, …), for initialising parameters."""

  @abc.abstractmethod
  def choose(self, count: int) -> np.ndarray:
    """Returns y (count, …) for the sample images drawn during training."""


@dataclasses.dataclass(frozen=True)
class LabelCondition(Condition):
  """Integer class labels in [0, num_classes); num_classes itself is the null label.

  Attributes:
    num_classes: number of classes, without the null label.
    dropout: see `Condition`.
    null: "learned" or "zero": how the null label is embedded; see `LabelEmbed`.
  """

  num_classes: int
  dropout: float
  null: str = "learned"

  @property
  def label(self) -> LabelCondition:
    return self

  def of_batch(self, batch: Mapping[str, Any]) -> Int[Array, "B"]:
    """Returns batch["label"]; raises ValueError if the labels are not integers."""
    return _check_integers(batch["label"])

  def embedder(self, hidden_size: int, dtype: Dtype) -> LabelEmbed:
    """Returns a `LabelEmbed` module."""
    return LabelEmbed(
      self.num_classes, hidden_size, self.dropout, dtype, self.null, name="label_embed"
    )

  def drop(self, key: Array, y: Int[Array, "B"], count: int) -> Int[Array, "B count"]:
    """Copies labels and replaces each by the null label with probability `dropout`."""
    copies = jnp.stack([_check_integers(y)] * count, axis=1)
    return drop_labels(key, copies, self.num_classes, self.dropout)

  def null_like(self, y: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns null labels (B,); raises ValueError if `dropout` is 0.

    A zero vector exists then too, but the network has never been trained with it.
    """
    if self.dropout == 0:
      raise ValueError("label_dropout = 0: must be above 0 to use the null label")
    return jnp.full_like(y, self.num_classes)

  def dummy(self, batch: int) -> Int[Array, "B"]:
    """Returns labels 0 (batch,)."""
    return jnp.zeros((batch,), jnp.int32)

  def choose(self, count: int) -> Int[np.ndarray, "count"]:
    """Returns labels 0, 1, …, num_classes - 1, 0, 1, … (count,)."""
    return np.arange(count) % self.num_classes


def _check_integers(labels: Array) -> Array:
  """Raises ValueError if the labels are not integers, which would index wrong rows."""
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}")
  return labels


@dataclasses.dataclass(frozen=True)
class CaptionCondition(Condition):
  """Embeddings of captions, (S, V) float32; zeros are the null caption.

  Attributes:
    length: S, tokens of a caption.
    channels: V, channels of the embedding of a token.
    dropout: see `Condition`.
  """

  length: int
  channels: int
  dropout: float

  def of_batch(self, batch: Mapping[str, Any]) -> Float[Array, "B S V"]:
    """Returns batch["caption"]; raises ValueError if it has another form."""
    return self._check(batch["caption"])

  def embedder(self, hidden_size: int, dtype: Dtype) -> PooledCaption:
    """Returns a `PooledCaption`; `MicroDiTText` has layers of its own instead."""
    return PooledCaption(hidden_size, self.dropout, dtype, name="caption_embed")

  def drop(
    self, key: Array, y: Float[Array, "B S V"], count: int
  ) -> Float[Array, "B count S V"]:
    """Copies captions and replaces each by zeros with probability `dropout`."""
    copies = jnp.stack([self._check(y)] * count, axis=1)
    return drop_captions(key, copies, self.dropout)

  def null_like(self, y: Float[Array, "B S V"]) -> Float[Array, "B S V"]:
    """Returns zeros; raises ValueError if `dropout` is 0."""
    if self.dropout == 0:
      raise ValueError("label_dropout = 0: must be above 0 to use the null caption")
    return jnp.zeros_like(y)

  def dummy(self, batch: int) -> Float[Array, "B S V"]:
    """Returns zeros (batch, S, V)."""
    return jnp.zeros((batch, self.length, self.channels))

  def choose(self, count: int) -> Float[np.ndarray, "count S V"]:
    """Returns null captions: this condition has no captions of its own."""
    return np.zeros((count, self.length, self.channels), np.float32)

  def _check(self, captions: Array) -> Array:
    """Raises ValueError if captions are not (B, any length, V) of a float dtype."""
    is_float = jnp.issubdtype(captions.dtype, jnp.floating)
    if not is_float or captions.ndim != 3 or captions.shape[-1] != self.channels:
      expected = f"(B, S, {self.channels}) of floats"
      found = f"{captions.shape} of {captions.dtype}"
      raise ValueError(f"captions must be {expected}, got {found}")
    return captions


# Name of a condition -> function (num_classes, dropout) that builds it. The values of
# `config.model.condition` are these names, or several of them joined by +.
CONDITIONS: dict[str, Callable[..., Condition]] = {"label": LabelCondition}
