"""The conditions of the images to draw: chosen by a rule, or given as arrays."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped

from mdt_jax.data import npy_format
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.conditions import arrays_of, check_array, stack_arrays
from mdt_jax.data.examples import Source
from mdt_jax.errors import SettingError
from mdt_jax.models.conditions import Condition, LabelCondition
from mdt_jax.paths import input_file
from mdt_jax.sampling.labels import BALANCED, Labels, choose_labels, parse_labels

# Arrays of a condition: name -> (…) for one image or (N, …) for N images; or one such
# array, for a condition of a single array.
Arrays: TypeAlias = Any
LABEL, CAPTION = "label", "caption"  # further arrays of a file of conditions


class Conditions(NamedTuple):
  """Conditions of N images.

  Attributes:
    y: (N, …) as the network reads them.
    labels: (N,) classes of the images; None if the condition has none.
    captions: N texts that are shown with the images.
    arrays: name -> (N, …), the arrays of the conditions.
  """

  y: Shaped[np.ndarray, "N ..."]
  labels: Int[np.ndarray, "N"] | None
  captions: Sequence[str]
  arrays: Mapping[str, np.ndarray] = {}


def choose_conditions(
  condition: Condition,
  count: int,
  held: DataLabels | None,
  how: str = BALANCED,
  seed: int = 0,
  open_data: Callable[[], Source] | None = None,
) -> Conditions:
  """Chooses the condition of each image that training and evaluation draw.

  Args:
    condition: the condition of the network.
    count: number N of images.
    held: the labels of the training data; None if unknown.
    how: "balanced" or "random"; see `labels.draw_labels`. For arrays of the data:
      evenly spaced or random examples.
    seed: seed of "random".
    open_data: returns the data of the run; needed for conditions of arrays.

  Returns:
    The conditions. For class labels, labels of the data; for arrays, those of examples
    of the data, with their labels. A condition of your own chooses itself.
  """
  if isinstance(condition, LabelCondition):
    y = choose_labels("labels", [how], count, condition.num_classes, seed, held=held)
    return Conditions(y, y, _captions_of(y, held))
  if not condition.arrays() or open_data is None:
    y = condition.choose(count)
    is_label = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    captions = _captions_of(y, held) if is_label else [""] * count
    return Conditions(y, y if is_label else None, captions)
  data = open_data()
  length = count if getattr(data, "is_endless", False) else len(data)
  # The constant makes the choice independent of the noise, which has the same seed.
  rng = np.random.default_rng((seed, 0xC0D))
  places = np.linspace(0, length - 1, count).astype(int)
  if how != BALANCED:
    places = rng.integers(0, length, count)
  labels, texts, arrays = [], [], []
  for place in places:
    example = data[int(place)]
    labels.append(int(example[LABEL]))
    texts.append(str(example.get(CAPTION, "")))
    arrays.append(arrays_of(example))
  classes = np.asarray(labels, np.int64)
  batch = stack_arrays(arrays)
  y = np.asarray(condition.of_batch({**batch, LABEL: classes}))
  shown = _captions_of(classes, held)
  captions = [text or label for text, label in zip(texts, shown, strict=True)]
  return Conditions(y, classes, captions, batch)


def make_conditions(
  condition: Condition,
  labels: Labels,
  arrays: Arrays | None,
  num_classes: int,
  held: DataLabels | None = None,
) -> Conditions:
  """Builds conditions from arrays and labels that a user gives.

  Args:
    condition: the condition of the network.
    labels: see `labels.parse_labels`; for a condition without labels, None.
    arrays: arrays of the condition; see `Arrays`. May also hold "label" (N,), in place
      of `labels`, and "caption" (N,) texts. For a condition without labels, "label"
      names the classes of the images in files.
    num_classes: number of classes of the network.
    held: the labels of the training data; None if unknown.

  Returns:
    Conditions of N images; arrays and labels of one image serve for all images.

  Raises:
    SettingError: setting "condition" or "labels": an array is missing, has another
      shape or is not finite, or the numbers of images differ.
  """
  label = condition.label
  has_null = label is not None and label.dropout > 0
  if not condition.arrays():
    if arrays is not None:
      accepted = "must be None: this network is conditioned on class labels alone"
      raise SettingError("condition", _shown(arrays), accepted)
    y = parse_labels("labels", labels, num_classes, has_null=has_null, held=held)
    return Conditions(y, y, _captions_of(y, held))
  given = _by_name(condition, arrays)
  batch = {
    name: _read(name, given[name], shape)
    for name, shape in _shapes(condition).items()
    if name in given
  }
  if LABEL in given:
    if labels is not None:
      raise SettingError("labels", _shown(labels), 'must be None beside a "label"')
  elif label is None and labels is not None:
    accepted = "must be None: the network has no class labels"
    raise SettingError("labels", _shown(labels), accepted)
  classes = None
  if LABEL in given or labels is not None or label is not None:
    classes = _classes(condition, given, labels, num_classes, held)
  captions = _texts(given.get(CAPTION, ""))
  known = {**batch, CAPTION: captions}
  known |= {} if classes is None else {LABEL: classes}
  count = _common_count({name: len(array) for name, array in known.items()})
  known = {n: np.broadcast_to(a, (count, *a.shape[1:])) for n, a in known.items()}
  batch = {name: known[name] for name in batch}
  classes, shown = known.get(LABEL), [str(text) for text in known[CAPTION]]
  if classes is not None and not any(shown):
    shown = _captions_of(classes, held)
  joined = batch if label is None else {**batch, LABEL: classes}
  return Conditions(np.asarray(condition.of_batch(joined)), classes, shown, batch)


def _classes(
  condition: Condition,
  given: Mapping[str, Any],
  labels: Labels,
  num_classes: int,
  held: DataLabels | None,
) -> Int[np.ndarray, "N"]:
  """Returns the classes beside arrays: `labels`, or those among the arrays."""
  label = condition.label
  has_null = label is not None and label.dropout > 0
  # Dropped together, the network was never trained on arrays without their label.
  together = label is not None and getattr(condition, "together", False)
  if LABEL not in given and labels is None and (together or not has_null):
    accepted = 'must be given, or "label" among the arrays: the condition has a label'
    raise SettingError("labels", None, accepted)
  chosen = given.get(LABEL, labels)
  try:
    classes = parse_labels("labels", chosen, num_classes, has_null=has_null, held=held)
  except SettingError as error:
    if LABEL not in given:
      raise
    accepted = f"{error.value!r} {error.accepted}"
    raise SettingError("condition", LABEL, accepted) from None
  if together and (classes == num_classes).any():
    accepted = "must be classes, not the null label: the network drops its conditions "
    accepted += "together, and was never trained on arrays without a label"
    setting = "condition" if LABEL in given else "labels"
    raise SettingError(setting, LABEL if LABEL in given else num_classes, accepted)
  return classes


def _common_count(counts: Mapping[str, int]) -> int:
  """Returns the number of images of arrays, of which some may be for one image."""
  most = max(counts.values(), default=1)
  for name, count in counts.items():
    if count not in (1, most):
      accepted = f"{name!r} is given for {count} images, others for {most}"
      raise SettingError("condition", name, accepted)
  return most


def _counts(condition: Condition, arrays: Mapping[str, Any]) -> dict[str, int]:
  """Returns name -> number of images, of the known arrays of several images."""
  shapes = {LABEL: (), CAPTION: (), **_shapes(condition)}
  return {
    name: len(np.asarray(array))
    for name, array in arrays.items()
    if name in shapes and np.ndim(array) > len(shapes[name])
  }


def count_images(condition: Condition, arrays: Mapping[str, Any]) -> int:
  """Returns for how many images arrays are given; see `make_conditions`.

  Raises:
    SettingError: setting "condition": the numbers of images differ.
  """
  return _common_count(_counts(condition, arrays))


def repeat_arrays(
  condition: Condition, arrays: Mapping[str, Any], count: int
) -> dict[str, Any]:
  """Repeats arrays of several images, in turn, until they are for `count` images."""
  several = {n for n, images in _counts(condition, arrays).items() if images > 1}
  return {
    name: np.asarray(array)[np.arange(count) % len(array)] if name in several else array
    for name, array in arrays.items()
  }


def make_null(
  condition: Condition,
  null: Any,
  count: int,
  num_classes: int,
  held: DataLabels | None = None,
) -> Shaped[np.ndarray, "N ..."] | None:
  """Builds the negative condition that replaces the null condition in guidance.

  Args:
    condition: the condition of the network.
    null: arrays as in `make_conditions`, with "label" for a network of labels and
      arrays; for a network of labels alone, a label. None: the null condition.
    count: number N of images.
    num_classes, held: see `make_conditions`.

  Raises:
    SettingError: setting "null": see `make_conditions`.
  """
  if null is None:
    return None
  arrays, label = null, None
  if not condition.arrays():
    arrays, label = None, null
    if isinstance(null, Mapping):
      if set(null) - {LABEL, CAPTION} or LABEL not in null:
        accepted = 'must hold a "label" alone: this network is conditioned on labels'
        raise SettingError("null", sorted(null), accepted)
      label = null[LABEL]
  try:
    y = make_conditions(condition, label, arrays, num_classes, held).y
  except SettingError as error:
    names = {"condition": "null", "labels": "null"}
    setting = names.get(error.setting, error.setting)
    raise SettingError(setting, error.value, error.accepted) from None
  if len(y) not in (1, count):
    accepted = f"must be given for one image or for all {count}"
    raise SettingError("null", len(y), accepted)
  return np.broadcast_to(y, (count, *y.shape[1:]))


def read_conditions(setting: str, path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a file of conditions: an .npz file of arrays by name.

  The file never runs code: arrays of Python objects are refused.

  Args:
    setting: name of the flag in errors.
    path: an .npz file, local or in a bucket, with the arrays of the condition (N, …),
      and optionally "label" (N,) and "caption" (N,) texts.

  Raises:
    SettingError: the file cannot be read.
  """
  file = input_file(setting, path)
  try:
    with file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
      names = npy_format.member_names(archive)
      read = npy_format.read_member
      found = {n: npy_format.with_bfloat16(read(archive, n)) for n in names}
  except npy_format.ERRORS as error:
    accepted = f"must be an .npz file of arrays: {error}"
    raise SettingError(setting, os.fspath(path), accepted) from None
  if not found:
    raise SettingError(setting, os.fspath(path), "holds no arrays")
  return found


def _shapes(condition: Condition) -> dict[str, tuple[int, ...]]:
  """Returns name -> shape of all arrays of a condition."""
  return {**condition.arrays(), **condition.optional_arrays()}


def _texts(value: Any) -> np.ndarray:
  """Returns captions as an array (N,) of texts."""
  texts = np.atleast_1d(np.asarray(value))
  if texts.ndim > 1 or texts.dtype.kind != "U" or not len(texts):
    found = f"{texts.dtype} of the shape {texts.shape}"
    raise SettingError("condition", CAPTION, f"must be (N,) texts, is {found}")
  return texts


def _by_name(condition: Condition, arrays: Arrays | None) -> Mapping[str, Any]:
  """Returns the arrays by name; raises SettingError if one is missing or unknown."""
  needed = condition.arrays()
  if arrays is None:
    forms = " and ".join(f"{name!r} {_form(shape)}" for name, shape in needed.items())
    raise SettingError("condition", None, f"must be given: this network needs {forms}")
  if not isinstance(arrays, Mapping):
    if len(needed) > 1:
      accepted = f"must be a dict with the arrays {', '.join(needed)}"
      raise SettingError("condition", _shown(arrays), accepted)
    return {next(iter(needed)): arrays}
  known = {*_shapes(condition), LABEL, CAPTION}
  for name in needed:
    if name not in arrays:
      held = ", ".join(map(str, arrays)) or "none"
      accepted = f"is missing; the arrays given are: {held}"
      raise SettingError("condition", name, accepted)
  for name in arrays:
    if name not in known:
      raise SettingError("condition", name, f"is unknown; known are {sorted(known)}")
  return arrays


def _read(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
  """Returns an array (N, …) of a condition; N = 1 for the array of one image."""
  try:
    array = np.asarray(value)
  except ValueError:  # lists of different lengths
    raise SettingError("condition", name, "must be an array of numbers") from None
  if array.shape == shape:
    array = array[None]
  if array.ndim != len(shape) + 1 or array.shape[1:] != shape or len(array) == 0:
    accepted = f"must have the shape {shape} or {_form(shape)}, has {array.shape}"
    raise SettingError("condition", name, accepted)
  return check_array("condition", name, array, array.shape, "the array")


def _form(shape: tuple[int, ...]) -> str:
  """Returns the shape of the arrays of several images, as text."""
  return f"({', '.join(map(str, ('N', *shape)))})"


def _captions_of(labels: np.ndarray, held: DataLabels | None) -> list[str]:
  """Returns the text of each label."""
  caption = str if held is None else held.caption
  return [caption(int(label)) for label in labels]


def _shown(value: Any) -> Any:
  """Returns a short form of a value for an error."""
  if hasattr(value, "__array__") or isinstance(value, Mapping):
    return type(value).__name__
  return value
