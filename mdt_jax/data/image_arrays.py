"""Arrays and captions of images, which a latent set holds beside the latents."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mdt_jax.data import file_names
from mdt_jax.data.captions import Captions, open_captions
from mdt_jax.data.condition_files import (
  ArrayFn,
  ArrayReader,
  ImageNames,
  describe,
  open_reader,
  source_text,
)
from mdt_jax.data.latent_card import ARRAY_DTYPES, MAX_VALUES, is_array_shape
from mdt_jax.data.latent_records import ArrayField
from mdt_jax.errors import SettingError, check_choice, one_line
from mdt_jax.logs import counted, logger

CHOICES = ("refuse", "leave_out")  # of images without an array
SHOWN = 3  # images that an error or the log names, at most
TRIED = 100  # images from which a function must make one array

# Name of an array -> file, folder, "module:function" or function.
Conditions = Mapping[str, str | os.PathLike[str] | ArrayFn]
LoadImage = Callable[[int], np.ndarray]  # raises if the image is unreadable


class Unusable(ValueError):
  """An array that is missing, or has values or a shape that cannot be used."""


class Entries(NamedTuple):
  """What a record holds beside moments, label and name.

  Attributes:
    arrays: the arrays, in the order of the layout.
    caption: the caption, or None.
  """

  arrays: tuple[np.ndarray, ...] = ()
  caption: str | None = None


class _Array:
  """An array of all images: where it is read, and what it must be.

  Attributes:
    field: name, shape and dtype.
    reader: reads the array of an image.
    shown: NAME=FILE, for errors.
  """

  def __init__(self, field: ArrayField, reader: ArrayReader, shown: str):
    self.field, self.reader, self.shown = field, reader, shown
    self._dtype = np.dtype(field.dtype)

  def read(self, name: str, image: np.ndarray | None) -> np.ndarray:
    """Returns the array of an image; raises Unusable, or any error of the reader."""
    found = self.reader.read(name, image)
    if found is not None and found.dtype == self._dtype:  # needs no slow conversion
      stored = found
    else:
      found = _stored(found)
      with np.errstate(over="ignore", invalid="ignore"):  # both are checked below
        stored = found.astype(self._dtype)
    if found.shape != self.field.shape:
      raise Unusable(f"has the shape {found.shape}, not {self.field.shape}")
    are_floats = found.dtype.kind == stored.dtype.kind == "f"
    if not are_floats and not np.array_equal(stored, found):
      raise Unusable(f"holds {found.dtype} values that {stored.dtype} does not hold")
    if not np.isfinite(stored).all():
      raise Unusable(f"is not finite in {stored.dtype}")
    return stored


class ImageArrays:
  """The arrays and captions of all images; see `open_image_arrays`.

  Attributes:
    card: the entries of the card of the set: "arrays" and "captions", if there are any,
      with the sources as the user gives them.
  """

  def __init__(
    self,
    arrays: Sequence[_Array],
    captions: Captions | None,
    card: dict[str, Any],
    missing: str,
  ):
    self._arrays, self._captions, self.card = arrays, captions, card
    self._is_refused = missing == "refuse"
    self._lock = threading.Lock()  # a function need not be safe in threads
    self._num_logged = 0

  def check(self, names: Iterable[str]) -> None:
    """Reads the arrays of images from files, before anything is encoded.

    Raises:
      SettingError: an array is missing or cannot be used, and such images are refused.
        The error counts the images and names the first ones.
    """
    names = list(names)
    for array in self._arrays:
      if array.reader.is_function:
        continue
      logger.info("checking %s for %s", array.shown, counted(len(names), "image"))
      problems = {}
      for name in names:
        try:
          array.read(name, None)
        except Exception as error:  # damaged files raise nearly every type
          problems[name] = _reason(array.reader, error)
      if not problems:
        continue
      first = [f"{one_line(n)} ({why})" for n, why in [*problems.items()][:SHOWN]]
      listed = ", ".join(first) + (", …" if len(problems) > SHOWN else "")
      text = f"{len(problems)} of {len(names)} images have no array: {listed}"
      if self._is_refused:
        raise SettingError("condition", array.shown, f"{text}; {_HINT}")
      logger.warning("Leaving out, for %s, %s", array.shown, text)

  def read(self, name: str, image: np.ndarray) -> Entries | None:
    """Returns the entries of an image; None if the image is left out.

    Args:
      name: name of the image.
      image: (H, W, 3) uint8.

    Raises:
      SettingError: an array cannot be used, and such images are refused.
    """
    found = []
    for array in self._arrays:
      try:
        if array.reader.is_function:
          with self._lock:
            found.append(array.read(name, image))
        else:
          found.append(array.read(name, image))
      except Exception as error:  # a function raises every type
        self._refuse_or_log(array, name, error)
        return None
    caption = None if self._captions is None else self._captions.of(name)
    return Entries(tuple(found), caption)

  def _refuse_or_log(self, array: _Array, name: str, error: Exception) -> None:
    """Raises SettingError for an image; or logs that the image is left out."""
    text = f"the image {one_line(name)} has no array: {_reason(array.reader, error)}"
    if self._is_refused:
      raise SettingError("condition", array.shown, f"{text}; {_HINT}") from error
    if not array.reader.is_function:
      return  # `check` has counted the image
    with self._lock:
      self._num_logged += 1
      number = self._num_logged
    if number <= SHOWN:
      more = "; further images are counted at the end" if number == SHOWN else ""
      logger.warning("Left out, for %s: %s%s", array.shown, text, more)


_HINT = "or leave such images out: --condition_missing=leave_out"


def open_image_arrays(
  conditions: Conditions,
  captions: str | os.PathLike[str] | None,
  missing: str,
  names: Sequence[str],
  load_image: LoadImage | None,
) -> ImageArrays | None:
  """Opens arrays and captions of images; None if there are none.

  Shape and dtype of an array are those of the first image that has it. float64 and
  bfloat16 become float32.

  Args:
    conditions: name of an array -> its source, see `condition_files.open_reader`.
    captions: file of captions, see `captions.open_captions`; None for none.
    missing: "refuse" or "leave_out": images whose array is missing, has another shape
      than the first, or is not finite.
    names: the names of all images.
    load_image: index -> image, for functions; None: functions are refused.

  Raises:
    SettingError: setting "condition", "captions" or "condition_missing".
  """
  check_choice("condition_missing", missing, CHOICES)
  if not conditions and missing != "refuse":
    raise SettingError("condition_missing", missing, "needs condition")
  if not conditions and captions is None:
    return None
  known = ImageNames(names)
  arrays, card = [], {}
  for name, given in conditions.items():
    shown = describe(name, given)
    reader = open_reader(name, given, known)
    if reader.is_function and load_image is None:
      accepted = "a function needs images; give a file for latents of another encoder"
      raise SettingError("condition", shown, accepted)
    first = _first(reader, shown, names, load_image, missing == "refuse")
    field = ArrayField(name, first.shape, first.dtype.name)
    arrays.append(_Array(field, reader, shown))
    entry = {"shape": list(field.shape), "dtype": field.dtype}
    card.setdefault("arrays", {})[name] = {**entry, "source": source_text(given)}
  texts = None
  if captions is not None:
    texts = open_captions(captions, known)
    card["captions"] = file_names.from_path(os.fspath(captions))
  return ImageArrays(arrays, texts, card, missing)


def _first(
  reader: ArrayReader,
  shown: str,
  names: Sequence[str],
  load_image: LoadImage | None,
  is_refused: bool,
) -> np.ndarray:
  """Returns the array of the first image that has one; raises SettingError if none."""
  reason = "there is none"
  tried = names[:TRIED] if reader.is_function else names
  for index, name in enumerate(tried):
    image = None
    if reader.is_function and load_image is not None:
      try:
        image = load_image(index)
      except Exception:  # the writer leaves unreadable images out
        continue
    try:
      return _stored(reader.read(name, image))
    except Exception as error:
      reason = _reason(reader, error)
      if is_refused and reader.is_function:
        text = f"the image {one_line(name)} has no array: {reason}; {_HINT}"
        raise SettingError("condition", shown, text) from error
  raise SettingError(
    "condition",
    shown,
    f"has an array for none of {len(tried)} images, such as {one_line(names[0])}: "
    f"{reason}",
  )


def _stored(found: np.ndarray | None) -> np.ndarray:
  """Returns an array in one of ARRAY_DTYPES; raises Unusable if there is none."""
  if found is None:
    raise Unusable("missing")
  if found.dtype == ml_dtypes.bfloat16 or (
    found.dtype.kind == "f" and found.dtype.itemsize > 4
  ):
    with np.errstate(over="ignore"):
      found = found.astype(np.float32)
  if found.dtype.name not in ARRAY_DTYPES:
    raise Unusable(f"must hold numbers, holds {found.dtype}")
  if not is_array_shape(list(found.shape)):
    accepted = f"sides from 1 with a product of at most {MAX_VALUES:,}"
    raise Unusable(f"has the shape {found.shape}; accepted are {accepted}")
  return found


def _reason(reader: ArrayReader, error: Exception) -> str:
  """Describes why an array cannot be used."""
  if isinstance(error, Unusable):
    return one_line(error)
  text = f"{type(error).__name__}: {one_line(error)}"
  return f"the function raises {text}" if reader.is_function else text
