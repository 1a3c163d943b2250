"""What a network is conditioned on: how it is read, embedded, dropped and sampled.

A new condition is one class here (or in a file of its own) and one line in CONDITIONS.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mdt_jax.errors import check_choice
from mdt_jax.models.embeddings import LabelEmbed, drop_labels
from mdt_jax.types import Array, Dtype


class Condition(abc.ABC):
  """The condition y of a network. Subclasses are frozen, hashable dataclasses.

  Attributes:
    dropout: share of the examples whose condition is dropped in training, for
      classifier-free guidance. 0: the network has no null condition.
  """

  dropout: float

  @abc.abstractmethod
  def of_batch(self, batch: Mapping[str, Array]) -> Array:
    """y (B, …) of the examples of a training step.

    Args:
      batch: arrays by name, with a leading axis B.

    Raises:
      ValueError: the batch holds values that cannot be embedded.
    """

  @abc.abstractmethod
  def embedder(self, hidden_size: int, dtype: Dtype) -> nn.Module:
    """A module (y (B, …), train) -> (B, D), for a network's compact `__call__`.

    Args:
      hidden_size: D, width of the network.
      dtype: of the embedding.
    """

  @abc.abstractmethod
  def drop(self, key: Array, y: Array, count: int) -> Array:
    """y of each of `count` passes, in which examples are dropped independently.

    Args:
      key: random key of the draw.
      y: (B, …).
      count: passes of the network over the same examples.

    Returns:
      (B, count, …), of the type of `y`, with the null condition where dropped.
    """

  @abc.abstractmethod
  def null_like(self, y: Array) -> Array:
    """The null condition for as many samples as `y` (B, …) has; of y's shape and type.

    Raises:
      ValueError: `dropout` is 0, so that the network has no null condition.
    """

  @abc.abstractmethod
  def dummy(self, batch: int) -> Array:
    """Any valid y (batch, …), to initialise parameters with."""

  @abc.abstractmethod
  def choose(self, count: int) -> np.ndarray:
    """y (count, …) of the samples that are drawn during training."""


@dataclasses.dataclass(frozen=True)
class LabelCondition(Condition):
  """Class labels: integers in [0, num_classes); num_classes is the null label.

  Attributes:
    num_classes: classes.
    dropout: see `Condition`.
  """

  num_classes: int
  dropout: float

  def of_batch(self, batch: Mapping[str, Array]) -> Int[Array, "B"]:
    return _check_integers(batch["label"])

  def embedder(self, hidden_size: int, dtype: Dtype) -> LabelEmbed:
    return LabelEmbed(
      self.num_classes, hidden_size, self.dropout, dtype, name="label_embed"
    )

  def drop(self, key: Array, y: Int[Array, "B"], count: int) -> Int[Array, "B count"]:
    copies = jnp.stack([_check_integers(y)] * count, axis=1)
    return drop_labels(key, copies, self.num_classes, self.dropout)

  def null_like(self, y: Int[Array, "B"]) -> Int[Array, "B"]:
    if self.dropout == 0:
      raise ValueError("there is no null label: label_dropout is 0")
    return jnp.full_like(y, self.num_classes)

  def dummy(self, batch: int) -> Int[Array, "B"]:
    return jnp.zeros((batch,), jnp.int32)

  def choose(self, count: int) -> Int[np.ndarray, "count"]:
    """Class after class, from 0, and again from 0 after the last."""
    return np.arange(count) % self.num_classes


def _check_integers(labels: Array) -> Array:
  """Raises ValueError for labels of a float type, which would index garbage."""
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers, not {labels.dtype}")
  return labels


# Name, as in `config.model.condition` -> class.
CONDITIONS: dict[str, Callable[..., Condition]] = {"label": LabelCondition}


def create_condition(name: str, *, num_classes: int, dropout: float) -> Condition:
  """Builds a condition by name.

  Args:
    name: key of CONDITIONS.
    num_classes: classes, or whatever the condition counts.
    dropout: see `Condition`.

  Raises:
    SettingError: unknown name.
  """
  check_choice("condition", name, CONDITIONS)
  return CONDITIONS[name](num_classes=num_classes, dropout=dropout)
