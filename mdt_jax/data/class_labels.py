"""The labels that the training data of a run holds, with the names of their classes.

Data may hold fewer classes than the network has labels for. A run stores the labels of
its data in WORKDIR/labels.json, so that sampling draws labels that the network has
learned:

  {"labels": [0, 1], "names": ["ant", "bee"]}     "names" is null without names
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mdt_jax.atomic import read_json, write_json
from mdt_jax.buckets import AnyPath
from mdt_jax.data.examples import Source
from mdt_jax.errors import SettingError
from mdt_jax.logs import counted, logger, printable

FILE = "labels.json"
_MAX_DIGITS = 18  # of a class number: each such number fits into int64
SHOWN_CLASSES = 3  # number of class names in a log line


@dataclasses.dataclass(frozen=True, eq=False)
class DataLabels:
  """The labels that data holds.

  Attributes:
    labels: (K,) labels of at least one example each, sorted.
    names: name of the class of each label, (K,); empty if the classes have no names.
    counts: number of examples of each label, (K,); None if unknown.
  """

  labels: Int[np.ndarray, " K"]
  names: Sequence[str] = ()
  counts: Int[np.ndarray, " K"] | None = None

  @classmethod
  def of(cls, source: Source) -> DataLabels:
    """Returns the labels of a source.

    A source may have `label_counts`, a dict label -> number of examples. Without it,
    the source counts as holding every label below `num_classes`. A source may also
    have `class_names`, the name of each class.
    """
    counts = getattr(source, "label_counts", None) or {}
    names = getattr(source, "class_names", None) or ()
    held = [label for label in sorted(counts) if counts[label] > 0]
    if held and not 0 <= held[0] <= held[-1] < source.num_classes:
      held = []  # the loader refuses these labels
    labels = np.asarray(held or range(source.num_classes))
    if len(names) != source.num_classes or not any(names):
      names = ()
    return cls(
      labels,
      [names[label] for label in labels] if names else (),
      np.asarray([counts[label] for label in held]) if held else None,
    )

  @classmethod
  def read(cls, workdir: AnyPath, num_classes: int) -> DataLabels | None:
    """Reads the labels of a run; None for a run that stored none.

    Args:
      workdir: folder of the run.
      num_classes: number of classes of the run's network.

    Raises:
      SettingError: setting "path": labels.json is damaged.
    """
    refuse = functools.partial(_damaged, workdir)
    try:
      found = read_json(workdir / FILE, refuse)
    except FileNotFoundError:
      return None
    return cls.from_dict(found, num_classes, FILE, refuse)

  @classmethod
  def from_dict(
    cls,
    found: Mapping[str, Any],
    num_classes: int,
    name: str,
    refuse: Callable[[str], Exception],
  ) -> DataLabels:
    """Returns the labels of a dict that `to_dict` made.

    Args:
      found: the dict, of a file that may be damaged.
      num_classes: number of classes of the run's network.
      name: name of the file in errors.
      refuse: makes the error that is raised from one line about the file.

    Raises:
      Exception: the error of `refuse`: the dict holds no labels of such a network.
    """
    labels = found.get("labels")
    if not _is_list(labels, int) or not labels:
      raise refuse(f'{name} must hold "labels", a list of whole numbers')
    if sorted(set(labels)) != labels or labels[0] < 0 or labels[-1] >= num_classes:
      raise refuse(f"{name} must hold increasing labels in [0, {num_classes})")
    names = found.get("names") or []
    if not _is_list(names, str) or len(names) not in (0, len(labels)):
      raise refuse(f'{name} must hold "names", one text for each label, or null')
    return cls(np.asarray(labels), names)

  def to_dict(self) -> dict[str, Any]:
    """Returns the contents of labels.json."""
    return {"labels": self.labels.tolist(), "names": list(self.names) or None}

  def write(self, workdir: AnyPath) -> None:
    """Writes labels.json."""
    write_json(workdir / FILE, self.to_dict())

  def choose(self, count: int) -> Int[np.ndarray, "count"]:
    """Returns all labels in turn, (count,) int64."""
    return self.labels[np.arange(count) % len(self.labels)]

  @property
  def label_of(self) -> dict[str, int]:
    """Name of a class -> its label; empty if the classes have no names."""
    return dict(zip(self.names, self.labels.tolist(), strict=False))

  def warn_of_order(self) -> None:
    """Warns if the names are numbers, and the labels are not in their order."""
    numbers = [class_number(name) for name in self.names]
    ordered = sorted(number for number in numbers if number is not None)
    if len(ordered) < len(numbers):
      return
    for name, number, other, label in zip(
      self.names, numbers, ordered, self.labels, strict=False
    ):
      if number != other:
        logger.warning(
          "Class %s has the label %d: classes are sorted as text, not as numbers",
          name,
          label,
        )
        return

  def caption(self, label: int) -> str:
    """Returns the number of a label with the name of its class, such as "0 ant"."""
    if not len(self.names) or label not in self.labels:
      return str(label)
    name = printable(self.names[int(np.searchsorted(self.labels, label))])
    return name if name == str(label) else f"{label} {name}"

  def describe(self) -> str:
    """Describes the classes: "2 classes of 10 to 12 images: ant, bee"."""
    text = counted(len(self.labels), "class", "classes")
    if self.counts is not None:
      least, most = int(self.counts.min()), int(self.counts.max())
      text += " of " + (f"{least:,} to " if least < most else "")
      text += counted(most, "image")
    if len(self.names):
      text += f": {', '.join(map(printable, self.names[:SHOWN_CLASSES]))}"
      text += ", …" if len(self.names) > SHOWN_CLASSES else ""
    return text


def class_number(text: str) -> int | None:
  """Returns the class number in a text; None for other texts, and above 18 digits."""
  text = text.strip()
  return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _is_list(value: Any, kind: type) -> bool:
  """Whether `value` is a list of `kind` alone; a bool is no int."""
  return isinstance(value, list) and all(type(item) is kind for item in value)


def _damaged(workdir: AnyPath, text: str) -> SettingError:
  """Returns the error for a labels.json that cannot be used."""
  return SettingError(
    "path", str(workdir), f"{text}; delete this file to draw all labels"
  )
