"""The card of a latent set, card.json: reading and checking it.

People edit cards by hand, so each value that a reader uses is checked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from mdt_jax.atomic import read_json
from mdt_jax.buckets import bucket_path, is_bucket
from mdt_jax.data.class_labels import class_number
from mdt_jax.errors import SettingError
from mdt_jax.paths import any_path, expand_home
from mdt_jax.types import RESERVED_NAMES

FORMAT = "mdt_jax latents 1"
FORMAT_WITH_ARRAYS = "mdt_jax latents 2"  # of a set with arrays or captions
CARD = "card.json"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Types of the arrays of a set; others are converted when the set is written.
_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
ARRAY_DTYPES = ("bool", *_INTEGERS, "float16", "float32")
MAX_AXES = 8  # axes of an array, at most
MAX_VALUES = 2**26  # numbers in a latent or in an array, at most
# Makes the error for a card from the sentence about it.
Refuse = Callable[[str], SettingError]


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the card of the finished set in the folder `path`.

  A card without "images", or a shard without "left_out", gets this entry.

  Raises:
    SettingError: there is no card, it cannot be read, has another format, or holds a
      value that cannot be used.
    DataUnavailable: the bucket does not answer.
  """

  def refuse(text: str) -> SettingError:
    return SettingError("config.data.path", str(path), text)

  is_in_bucket = is_bucket(path)
  folder = bucket_path("config.data.path", path) if is_in_bucket else expand_home(path)
  try:
    card = read_json(folder / CARD, refuse)
  except FileNotFoundError:
    if is_in_bucket:
      any_path("config.data.path", path)  # raises if there is no such bucket
    raise refuse(
      f"holds no {CARD}: must be a finished output of python -m mdt_jax.encode"
    ) from None
  check_card(card, refuse)
  card.setdefault("images", sum(shard["images"] for shard in card["shards"]))
  for shard in card["shards"]:
    shard.setdefault("left_out", [])
  return card


def format_name(has_arrays: bool) -> str:
  """Returns the format of a set with or without arrays and captions.

  Versions of mdt_jax before arrays read the sets without them.
  """
  return FORMAT_WITH_ARRAYS if has_arrays else FORMAT


def check_card(card: dict[str, Any], refuse: Refuse) -> None:
  """Checks the values of a finished card that readers use.

  Args:
    card: content of card.json.
    refuse: makes the error that is raised.
  """
  if card.get("format") not in (FORMAT, FORMAT_WITH_ARRAYS):
    accepted = f"{FORMAT!r} or {FORMAT_WITH_ARRAYS!r}"
    raise refuse(f"{CARD} must have the format {accepted}")
  shape = card.get("latent_shape")
  if not (
    isinstance(shape, list)
    and len(shape) == 3
    and all(is_whole(side, 1) for side in shape)
    and math.prod(shape) <= MAX_VALUES
  ):
    raise refuse(
      f"{CARD} must hold latent_shape, three whole numbers from 1 with a product of at "
      f"most {MAX_VALUES:,}; holds {shorten(shape)}"
    )
  if card.get("dtype") not in [*DTYPES]:
    held = shorten(card.get("dtype"))
    raise refuse(f"{CARD} must hold dtype, {' or '.join(DTYPES)}; holds {held}")
  _check_arrays(card, refuse)
  classes = card.get("classes")
  if not (isinstance(classes, list) and classes and all(map(_is_text, classes))):
    raise refuse(f"{CARD} must hold classes, a list of at least one name")
  shards = card.get("shards")
  if not (isinstance(shards, list) and shards):
    raise refuse(f"{CARD} must hold shards, a list of at least one shard")
  for number, shard in enumerate(shards):
    check_shard(shard, f"shard {number} of {CARD}", len(classes), refuse)
  total = sum(shard["images"] for shard in shards)
  if not total or not is_whole(card.get("images", total), 0):
    raise refuse(f"{CARD} must hold images, the number of images, and at least one")


def _check_arrays(card: dict[str, Any], refuse: Refuse) -> None:
  """Checks the entries "arrays" and "captions" of a card."""
  held = {"arrays", "captions"} & card.keys()
  if card["format"] == FORMAT and held:
    needed = f"{' and '.join(sorted(held))} need the format {FORMAT_WITH_ARRAYS!r}"
    raise refuse(f"{CARD} holds {needed}")
  arrays = card.get("arrays", {})
  if not isinstance(arrays, dict):
    raise refuse(f"{CARD} must hold arrays, a dict of arrays by name")
  for name, array in arrays.items():
    if not is_array_name(name):
      raise refuse(f"{CARD} holds arrays with the name {shorten(name)}")
    array = array if isinstance(array, dict) else {}
    shape, dtype = array.get("shape"), array.get("dtype")
    if not is_array_shape(shape) or dtype not in [*ARRAY_DTYPES]:
      raise refuse(
        f"{CARD} must hold shape (whole numbers) and dtype ({', '.join(ARRAY_DTYPES)}) "
        f"of the array {name}; holds {shorten(shape)} and {shorten(dtype)}"
      )


def is_array_name(name: str) -> bool:
  """Whether an array may have this name: an identifier, not the name of an entry."""
  return name.isidentifier() and name.isascii() and name not in RESERVED_NAMES


def is_array_shape(shape: Any) -> bool:
  """Whether an array of a record may have this shape, a list."""
  return (
    isinstance(shape, list)
    and len(shape) <= MAX_AXES
    and all(is_whole(side, 1) for side in shape)
    and math.prod(shape) <= MAX_VALUES
  )


def check_shard(shard: Any, where: str, num_classes: int, refuse: Refuse) -> None:
  """Checks the entry of a shard.

  Args:
    shard: the entry.
    where: where the entry is, for errors.
    num_classes: number of classes of the set.
    refuse: makes the error that is raised.
  """
  if not isinstance(shard, dict):
    raise refuse(f"{where} must be a dict, is {shorten(shard)}")
  file = shard.get("file")
  if not _is_text(file) or Path(file).name != file or "\0" in file:
    raise refuse(f"{where} must have file, the name of a file; has {shorten(file)}")
  for name in ("images", "bytes"):
    if not is_whole(shard.get(name), 0):
      raise refuse(
        f"{where} must have {name}, a whole number; has {shorten(shard.get(name))}"
      )
  left_out = shard.get("left_out", [])
  if not (isinstance(left_out, list) and all(map(_is_text, left_out))):
    raise refuse(f"{where} must have left_out, a list of names")
  labels = shard.get("labels", {})
  if not isinstance(labels, dict) or not all(
    (number := class_number(label)) is not None
    and number < num_classes
    and is_whole(count, 0)
    for label, count in labels.items()
  ):
    raise refuse(
      f"{where} must have labels, numbers of images by label below {num_classes}"
    )


def is_whole(value: Any, least: int) -> TypeGuard[int]:
  """Whether `value` is a whole number from `least` that NumPy can hold."""
  return type(value) is int and least <= value < 2**63


def shorten(value: Any) -> str:
  """Returns repr(value), cut off after 80 characters."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}…"


def _is_text(value: Any) -> TypeGuard[str]:
  return isinstance(value, str)
