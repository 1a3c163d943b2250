"""Heights and widths of images, latents and grids of tokens.

A size is one whole number for a square, or (height, width). `height_width` is the only
function that interprets a size; `to_size` gives every square the form of one number, so
that equal sizes compare equal.
"""

from __future__ import annotations

import numbers
from typing import Any, TypeAlias

from mdt_jax.errors import SettingError

Size: TypeAlias = int | tuple[int, int]


def height_width(size: Size, setting: str = "size") -> tuple[int, int]:
  """Returns (height, width).

  Args:
    size: one whole number for a square, or (height, width).
    setting: name of the size in errors.

  Raises:
    SettingError: `size` has another form.
  """
  sides: Any = size if isinstance(size, (tuple, list)) else (size, size)
  if len(sides) != 2 or not all(_is_whole(side) for side in sides):
    raise SettingError(setting, size, "must be a whole number, or (height, width)")
  return int(sides[0]), int(sides[1])


def to_size(size: Size, setting: str = "size") -> Size:
  """Returns one number for a square, else (height, width); see `height_width`."""
  height, width = height_width(size, setting)
  return height if height == width else (height, width)


def parse_size(setting: str, text: str) -> Size:
  """Returns the size in the value of a flag, such as 256 or 256,384.

  Raises:
    SettingError: the text is not one or two whole numbers.
  """
  try:
    sides: Any = tuple(int(side) for side in text.strip("()[]").split(","))
    return to_size(sides[0] if len(sides) == 1 else sides)
  except ValueError:  # SettingError is a ValueError too
    raise SettingError(
      setting, text, "must be a whole number, or HEIGHT,WIDTH such as 256,384"
    ) from None


def describe_size(size: Size) -> str:
  """Returns HEIGHTxWIDTH, for messages."""
  return "x".join(map(str, height_width(size)))


def _is_whole(side: Any) -> bool:
  return isinstance(side, numbers.Integral) and not isinstance(side, bool)
