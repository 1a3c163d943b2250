"""Arrays for conditions: in files, by the names of images, or from a function."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from mdt_jax.data import file_names, npy_format
from mdt_jax.data.latent_card import is_array_name
from mdt_jax.errors import SettingError, one_line
from mdt_jax.paths import local_path
from mdt_jax.types import RESERVED_NAMES

# (image (H, W, 3) uint8, name of the image) -> array.
ArrayFn: TypeAlias = Callable[[np.ndarray, str], Any]
# Makes the error for a file or function from the sentence about it.
Refuse: TypeAlias = Callable[[str], SettingError]
KINDS = (
  "an .npz, .safetensors or .npy file, a folder of .npy files, or a Python function "
  "module:function"
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SUFFIXES = (".npz", ".safetensors", ".npy")


class ImageNames:
  """The names of all images, which find the entry of an image in a file.

  An entry has the name of the image, with or without its extension. Without extension,
  an entry belongs to no image if several images have this name.

  Args:
    names: the names, in the order of the data.
  """

  def __init__(self, names: Sequence[str]):
    self.names = names
    self._stems = Counter(os.path.splitext(name)[0] for name in names)

  def find(self, name: str, keys: Container[str]) -> str | None:
    """Returns the key of the image `name` among `keys`; None if there is none."""
    if name in keys:
      return name
    stem = os.path.splitext(name)[0]
    return stem if self._stems[stem] == 1 and stem in keys else None


class ArrayReader(Protocol):
  """Interface of the arrays of images.

  Attributes:
    is_function: whether `read` calls a function of the user.
  """

  is_function: bool

  def read(self, name: str, image: np.ndarray | None, /) -> np.ndarray | None:
    """Returns the array of an image; None if there is none. May raise anything."""
    ...


class KeyedArrays:
  """Arrays of a file, by keys.

  Args:
    names: the names of all images.
    keys: the keys of the arrays.
    load: key -> array.
  """

  is_function = False

  def __init__(
    self, names: ImageNames, keys: Container[str], load: Callable[[str], np.ndarray]
  ):
    self._names, self._keys, self._load = names, keys, load

  def read(self, name: str, image: np.ndarray | None) -> np.ndarray | None:
    del image
    key = self._names.find(name, self._keys)
    return None if key is None else self._load(key)


class FunctionArrays:
  """Arrays that a function computes from an image and its name."""

  is_function = True

  def __init__(self, function: ArrayFn):
    self._function = function

  def read(self, name: str, image: np.ndarray | None) -> np.ndarray:
    assert image is not None
    return np.asarray(self._function(image, name))


class _FolderKeys:
  """The keys of a folder of .npy files."""

  def __init__(self, folder: Path):
    self._folder = folder

  def path(self, key: str) -> Path:
    """Returns the path of the file of a key."""
    return self._folder / f"{file_names.to_path(key)}.npy"

  def __contains__(self, key: object) -> bool:
    return isinstance(key, str) and self.path(key).is_file()

  def load(self, key: str) -> np.ndarray:
    """Reads the file of a key."""
    return npy_format.read_npy(self.path(key).read_bytes())


def parse_conditions(text: str) -> dict[str, str]:
  """Returns array name -> file or function, of "NAME=FILE,NAME=FILE,…".

  Raises:
    SettingError: setting "condition": the text has another form, or an array has a name
      that is not accepted or is given twice.
  """
  found: dict[str, str] = {}
  for part in text.split(","):
    name, equals, file = part.partition("=")
    if not (name and equals and file):
      accepted = f"must be NAME=FILE, or several joined by commas; FILE is {KINDS}"
      raise SettingError("condition", text, accepted)
    if name in found:
      raise SettingError("condition", text, f"names the array {name} twice")
    check_array_name(name)
    found[name] = file
  return found


def check_array_name(name: str) -> None:
  """Raises SettingError if an array may not have this name."""
  if not is_array_name(name):
    accepted = "must be a name of letters, digits and _, and none of "
    raise SettingError("condition", name, accepted + ", ".join(RESERVED_NAMES))


def describe(name: str, given: str | os.PathLike[str] | ArrayFn) -> str:
  """Returns NAME=FILE, as the user gives an array of a condition."""
  return f"{name}={source_text(given)}"


def source_text(given: str | os.PathLike[str] | ArrayFn) -> str:
  """Returns the path of a file or folder, or module:function of a function."""
  if isinstance(given, str | os.PathLike):
    return file_names.from_path(os.fspath(given))
  module = getattr(given, "__module__", "")
  return f"{module}:{getattr(given, '__qualname__', type(given).__name__)}"


def open_reader(
  name: str, given: str | os.PathLike[str] | ArrayFn, names: ImageNames
) -> ArrayReader:
  """Opens the arrays of a condition.

  Args:
    name: name of the array.
    given: a file or a folder, see docs/data.md; "module:function"; or a function.
    names: the names of all images.

  Raises:
    SettingError: setting "condition": a file is missing, damaged or of another type, or
      the function cannot be imported.
  """
  check_array_name(name)
  shown = describe(name, given)

  def refuse(text: str) -> SettingError:
    return SettingError("condition", shown, text)

  if not isinstance(given, str | os.PathLike):
    return FunctionArrays(given)
  text = os.fspath(given)
  path = local_path("condition", text)
  if _FUNCTION.fullmatch(text) and not path.exists():
    return FunctionArrays(_import_function(text, refuse))
  if path.is_dir():
    keys = _FolderKeys(path)
    return KeyedArrays(names, keys, keys.load)
  if path.suffix.lower() not in _SUFFIXES:
    raise refuse(f"must be {KINDS}")
  if not path.is_file():
    raise refuse("is not a file that exists")
  with _reading(refuse):
    return _OPENERS[path.suffix.lower()](path, names, refuse)


def _open_npz(path: Path, names: ImageNames, refuse: Refuse) -> KeyedArrays:
  """Opens an array for each image, or the arrays "names" and "values"."""
  archive = zipfile.ZipFile(path)

  def load(key: str) -> np.ndarray:
    return npy_format.with_bfloat16(npy_format.read_member(archive, key))

  keys = set(npy_format.member_names(archive))
  if not {"names", "values"} <= keys:
    return KeyedArrays(names, keys, load)
  listed, values = load("names"), load("values")
  archive.close()
  if listed.ndim != 1 or listed.dtype.kind not in "US":
    found = f"{listed.dtype} of shape {listed.shape}"
    raise refuse(f"names must hold one text for each row of values; holds {found}")
  texts = [t.decode() if isinstance(t, bytes) else t for t in listed.tolist()]
  return _rows(texts, values, names, refuse)


def _open_safetensors(path: Path, names: ImageNames, refuse: Refuse) -> KeyedArrays:
  from safetensors import safe_open

  opened: Any = safe_open(str(path), "numpy")
  return KeyedArrays(names, set(opened.keys()), opened.get_tensor)


def _open_npy(path: Path, names: ImageNames, refuse: Refuse) -> KeyedArrays:
  """Opens rows: in the order of FILE_names.txt, or else of the data."""
  with open(path, "rb") as file:
    header = npy_format.read_header(file)
    if header.num_bytes > os.path.getsize(path):
      raise ValueError(f"its shape is {header.shape}, for which it is too short")
  values = np.load(path, mmap_mode="r", allow_pickle=False)
  values = npy_format.with_bfloat16(values)
  beside = path.with_name(f"{path.stem}_names.txt")
  if beside.exists():
    lines = file_names.from_bytes(beside.read_bytes()).removesuffix("\n")
    texts = [line.removesuffix("\r") for line in lines.split("\n")]
    return _rows(texts, values, names, refuse)
  if values.shape[:1] != (len(names.names),):
    raise refuse(
      f"has the shape {values.shape}, but the data has {len(names.names)} images: "
      f"must have one row for each image, or {beside.name} with the name of each row"
    )
  return _rows(names.names, values, names, refuse)


def _rows(
  texts: Sequence[str], values: np.ndarray, names: ImageNames, refuse: Refuse
) -> KeyedArrays:
  """Returns the rows of an array (N, …) by their names."""
  if values.shape[:1] != (len(texts),):
    raise refuse(f"has {len(texts)} names for values of shape {values.shape}")
  rows = {text: row for row, text in enumerate(texts)}
  if len(rows) < len(texts):
    twice = next(text for text, count in Counter(texts).items() if count > 1)
    raise refuse(f"holds the name {one_line(twice, 80)} twice")
  return KeyedArrays(names, rows, lambda key: np.asarray(values[rows[key]]))


_OPENERS: Mapping[str, Callable[[Path, ImageNames, Refuse], KeyedArrays]] = {
  ".npz": _open_npz,
  ".safetensors": _open_safetensors,
  ".npy": _open_npy,
}


def _import_function(text: str, refuse: Refuse) -> ArrayFn:
  """Imports module:function; modules of the current folder count."""
  module_name, _, name = text.partition(":")
  if os.getcwd() not in sys.path and "" not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except (Exception, SystemExit) as error:  # the module is the user's code
    reason = f"{type(error).__name__}: {one_line(str(error))}"
    raise refuse(f"the module {module_name} cannot be imported ({reason})") from None
  function = getattr(module, name, None)
  if not callable(function):
    raise refuse(f"the module {module_name} has no function {name}")
  return function


@contextlib.contextmanager
def _reading(refuse: Refuse) -> Iterator[None]:
  """Turns errors in reading a file into a SettingError of one line."""
  try:
    yield
  except SettingError:
    raise
  except Exception as error:  # the errors of safetensors have no base class
    raise refuse(f"cannot be read: {one_line(error)}") from None
