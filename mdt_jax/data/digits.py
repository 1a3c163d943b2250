"""The handwritten digits bundled with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from mdt_jax.data.examples import Example, SourceArguments, count_labels
from mdt_jax.errors import SettingError

SIZE, CHANNELS = 8, 1


class DigitsSource:
  """The 1,797 handwritten digits of scikit-learn, in 10 classes.

  The entry "image" of an example is uint8 (8, 8, 1): the grey levels 0 … 16 scaled to
  0 … 255.
  """

  num_classes: int = 10
  image_shape: tuple[int, int, int] = (SIZE, SIZE, CHANNELS)

  def __init__(self):
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    self._images = np.round(digits.images * 255 / 16).astype(np.uint8)[..., None]
    self._labels = digits.target.astype(np.int32)
    self.label_counts = count_labels(self._labels)

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    return {"image": self._images[index], "label": self._labels[index]}


def open_digits(arguments: SourceArguments) -> DigitsSource:
  """Opens the digits; raises SettingError unless the arguments ask for 8x8x1."""
  if arguments.image_size != SIZE:
    raise SettingError(
      "config.model.input_size",
      arguments.image_size,
      f"accepted is {SIZE} for digits",
    )
  if arguments.channels != CHANNELS:
    raise SettingError(
      "config.model.in_channels",
      arguments.channels,
      f"accepted is {CHANNELS} for digits",
    )
  return DigitsSource()
