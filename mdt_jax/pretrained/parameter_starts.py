"""How a parameter of a new network starts; `adaptation` chooses one for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

KEPT, RESIZED, NEW, NEUTRAL = "kept", "resized", "new values", "neutral"

# Path of a parameter of the old network -> its value.
Read: TypeAlias = Callable[[str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Start:
  """How a parameter of the new network starts.

  Attributes:
    how: KEPT, RESIZED, NEW or NEUTRAL.
    compute: (reader of old parameters, new values) -> the parameter, float32. The new
      values are those of a fresh network; None if `needs_new` is False.
    note: what happens, in words; empty if `how` says it.
    needs_new: whether `compute` needs new values.
  """

  how: str
  compute: Callable[[Read, np.ndarray | None], np.ndarray]
  note: str = ""
  needs_new: bool = False


def start_anew(why: str) -> Start:
  """Returns the start of a parameter as in a fresh network; `why` says the reason."""

  def compute(read: Read, new: np.ndarray | None) -> np.ndarray:
    del read
    assert new is not None
    return np.array(new, np.float32)

  return Start(NEW, compute, f"{NEW}: {why}", needs_new=True)


def neutral_layer(inside: str, shape: tuple[int, ...]) -> np.ndarray | None:
  """Returns the parameter of a block that changes nothing; None if there is none.

  A long skip joins (x, skip) by a linear map of 2D to D: the identity of x is neutral.
  """
  if inside == "skip/kernel":
    return np.eye(*shape, dtype=np.float32)
  if inside in ("skip/bias", "attention/relative_position_bias"):
    return np.zeros(shape, np.float32)
  return None
