"""Hostile data files, from a seed: damaged, edited by hand, or made to do harm.

`cases` writes them. Each path is given to a setting of a command, which must either use
the data or refuse it: in one line, with exit code 2, within seconds, and without taking
memory. The files fit a network of 8x8x1 with at least 3 classes.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

from mdt_jax.data import latent_card
from mdt_jax.data.latent_set import LatentSet
from mdt_jax.data.latent_writer import write_latents

Rng = np.random.Generator
# (random numbers, an empty folder) -> the path to give; writes what is there
Write = Callable[[Rng, Path], Path]
SIZE, NUM_CLASSES, NUM_IMAGES = 8, 3, 12
_PATH = "--config.data.path"


def cases(
  folder: str | Path, seed: int, count: int, first: int = 0
) -> list[tuple[str, Path]]:
  """Writes `count` hostile inputs, of each kind in turn.

  Args:
    folder: folder to write to; one folder is created for each input.
    seed: seed of everything random.
    count: number of inputs. There are `len(kinds())` kinds.
    first: number of the first input, to write the inputs of a seed in several calls.

  Returns:
    A list of (setting, path): the setting or flag, such as "--config.data.path", and
    the path to give to it. `flags` adds the other flags that the path needs.
  """
  folder = Path(folder)
  found = []
  named = list(kinds().items())
  for i in range(first, first + count):
    (setting, source, name), write = named[i % len(named)]
    place = folder / f"{i:05d}_{name}" / source
    place.mkdir(parents=True)
    found.append((setting, write(np.random.default_rng((seed, i)), place)))
  return found


def flags(setting: str, path: Path) -> list[str]:
  """Returns the flags that give a path of `cases` to its setting."""
  if setting == _PATH:
    source = next(s for s in ("latents", "npz", "arrays", "images") if s in path.parts)
    return [f"--config.data.source={source}", f"{setting}={path}"]
  return [f"{setting}={path}"]


def kinds() -> dict[tuple[str, str, str], Write]:
  """Returns (setting, source, name of the kind) -> function that writes it."""
  found: dict[tuple[str, str, str], Write] = {}
  for name, harm in MUTATIONS.items():
    found[_PATH, "latents", f"card_{name}"] = _in_set("card.json", harm)
    found[_PATH, "latents", f"shard_{name}"] = _in_set("*.array_record", harm)
    found[_PATH, "npz", f"npz_{name}"] = _mutated("x.npz", _npz, harm)
    found["--reference", "samples", f"npz_{name}"] = _mutated("x.npz", _npz, harm)
    found["--samples", "samples", f"zip_{name}"] = _mutated("x.npz", _zipped, harm)
    found[_PATH, "npz", f"npy_{name}"] = _mutated("x.npy", _npy, harm)
    found[_PATH, "arrays", f"array_{name}"] = _mutated("a_0.npy", _array, harm, True)
    found["--features", "features", f"file_{name}"] = _mutated(
      "x.safetensors", _safetensors, harm
    )
    found["--features", "features", f"folder_{name}"] = _mutated(
      "a_0.npy", _array, harm, True
    )
    found[_PATH, "images", f"tar_{name}"] = _mutated("x.tar", _tar, harm)
    found[_PATH, "images", f"shards_{name}"] = _mutated("x.tar", _webdataset, harm)
    for ending in ("png", "jpg", "gif", "bmp", "webp", "tif"):
      data = functools.partial(_image, ending)
      found[_PATH, "images", f"{ending}_{name}"] = _mutated(
        f"a_0.{ending}", data, harm, True
      )
  for i, name in enumerate(("value", "key", "list", "number")):
    found[_PATH, "latents", f"card_edit_{name}"] = _in_set("card.json", _EDITS[i])
    found[_PATH, "images", f"dataset_json_{name}"] = _with_dataset_json(_EDITS[i])
  for name, write in _CRAFTED_SETS.items():
    found[_PATH, "latents", name] = _crafted_set(write)
  for name, write in _CRAFTED_NPZ.items():
    found[_PATH, "npz", name] = _crafted_file("x.npz", write)
    found["--samples", "samples", name] = _crafted_file("x.npz", write)
    found["--reference", "samples", name] = _crafted_file("x.npz", write)
    found["--features", "features", name] = _crafted_file("x.npz", write)
  for name, write in _CRAFTED_NPY.items():
    found[_PATH, "npz", name] = _crafted_file("x.npy", write)
    found[_PATH, "arrays", name] = _crafted_file("a_0.npy", write, True)
  for name, write in _CRAFTED_TARS.items():
    found[_PATH, "images", name] = _crafted_file("x.tar", write)
  for name, write in _CRAFTED_IMAGES.items():
    found[_PATH, "images", name] = _crafted_file("a_0.png", write, True)
  return found


# Mutations of bytes.


def _flip(data: bytes, rng: Rng) -> bytes:
  changed = bytearray(data)
  for place in rng.integers(0, len(data), rng.integers(1, 4)):
    changed[place] ^= 1 << int(rng.integers(8))
  return bytes(changed)


def _cut(data: bytes, rng: Rng) -> bytes:
  return data[: rng.integers(0, len(data))]


def _zero(data: bytes, rng: Rng) -> bytes:
  start = int(rng.integers(0, len(data)))
  stop = min(len(data), start + int(rng.choice([1, 8, 64, 512, 4096])))
  return data[:start] + bytes(stop - start) + data[stop:]


def _grow(data: bytes, rng: Rng) -> bytes:
  place = int(rng.integers(0, len(data) + 1))
  return data[:place] + rng.bytes(int(rng.integers(1, 2000))) + data[place:]


def _repeat(data: bytes, rng: Rng) -> bytes:
  start, stop = sorted(rng.integers(0, len(data), 2))
  return data[:stop] + data[start:]


def _ones(data: bytes, rng: Rng) -> bytes:
  place = int(rng.integers(0, len(data)))
  return data[:place] + b"\xff" * 8 + data[place + 8 :]


MUTATIONS: dict[str, Callable[[bytes, Rng], bytes]] = {
  "flip": _flip,
  "cut": _cut,
  "zero": _zero,
  "grow": _grow,
  "repeat": _repeat,
  "ones": _ones,
}

# Edits of JSON.
_VALUES: list[Any] = [
  None,
  True,
  0,
  -1,
  2**31,
  2**63,
  10**30,
  1.5,
  float("nan"),
  float("inf"),
  "",
  "x",
  "../../x",
  "/etc/passwd",
  "\udce9",
  "\0",
  "x" * 100_000,
  [],
  [[]],
  [None],
  {},
  {"x": 1},
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
  """The path of each value inside a JSON value."""
  items: list[tuple[Any, Any]] = []
  if isinstance(value, dict):
    items = list(value.items())
  elif isinstance(value, list):
    items = list(enumerate(value))
  return [path] + [place for k, v in items for place in _places(v, (*path, k))]


def _edit(data: bytes, rng: Rng, change: Callable[[Any, Any, Rng], None]) -> bytes:
  """Applies `change` to the parent and the key of a random value of JSON."""
  root = [json.loads(data)]
  places = [place for place in _places(root) if place]
  *above, key = places[int(rng.integers(len(places)))]
  parent: Any = root
  for step in above:
    parent = parent[step]
  change(parent, key, rng)
  return json.dumps(root[0] if root else None).encode()


def _set_value(parent: Any, key: Any, rng: Rng) -> None:
  parent[key] = _VALUES[int(rng.integers(len(_VALUES)))]


def _change_keys(parent: Any, key: Any, rng: Rng) -> None:
  if rng.random() < 0.7 or isinstance(parent, list):
    del parent[key]
  else:
    parent["other"] = parent.pop(key)


def _change_list(parent: Any, key: Any, rng: Rng) -> None:
  value = parent[key]
  if isinstance(value, list):
    parent[key] = [[], value * 2, value[::-1], value[:1] * 1000][int(rng.integers(4))]
  else:
    parent[key] = [value] * int(rng.integers(0, 4))


def _change_number(parent: Any, key: Any, rng: Rng) -> None:
  value = parent[key]
  if isinstance(value, (int, float)):
    parent[key] = [value + 1, -value, value * 10**9, str(value), float(value)][
      int(rng.integers(5))
    ]
  else:
    parent[key] = int(rng.integers(-(2**62), 2**62))


_EDITS = [
  functools.partial(_edit, change=change)
  for change in (_set_value, _change_keys, _change_list, _change_number)
]


# Valid files.


def _images(rng: Rng, count: int = NUM_IMAGES) -> np.ndarray:
  return rng.integers(0, 256, (count, SIZE, SIZE, 1), np.uint8)


def _labels(count: int = NUM_IMAGES) -> np.ndarray:
  return np.arange(count) % NUM_CLASSES


def _saved(save: Callable[[io.BytesIO], Any]) -> bytes:
  held = io.BytesIO()
  save(held)
  return held.getvalue()


def _npz(rng: Rng) -> bytes:
  return _saved(lambda file: np.savez(file, arr_0=_images(rng), arr_1=_labels()))


def _zipped(rng: Rng) -> bytes:
  images = _images(rng)
  return _saved(lambda file: np.savez_compressed(file, arr_0=images, arr_1=_labels()))


def _npy(rng: Rng) -> bytes:
  return _saved(lambda file: np.save(file, _images(rng)))


def _array(rng: Rng) -> bytes:
  array = rng.normal(size=(SIZE, SIZE, 1)).astype(np.float32)
  return _saved(lambda file: np.save(file, array))


def _safetensors(rng: Rng) -> bytes:
  latents = rng.normal(size=(NUM_IMAGES, 1, SIZE, SIZE)).astype(np.float32)
  return save({"latents": latents, "labels": _labels()})


def _image(ending: str, rng: Rng) -> bytes:
  image = Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8))
  kinds = {"jpg": "JPEG", "tif": "TIFF"}
  kind = kinds.get(ending, ending.upper())
  return _saved(lambda file: image.save(file, kind))


def _members(files: list[tuple[str, bytes]]) -> bytes:
  def save(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
      for name, data in files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

  return _saved(save)


def _tar(rng: Rng) -> bytes:
  return _members([(f"{'ab'[i % 2]}/{i}.png", _image("png", rng)) for i in range(6)])


def _webdataset(rng: Rng) -> bytes:
  files = []
  for i in range(4):
    label = {"label": i % NUM_CLASSES, "width": 16}
    files.append((f"{i}.png", _image("png", rng)))
    files.append((f"{i}.json", json.dumps(label).encode()))
  return _members(files)


class _Named:
  """Named images for `write_latents`; their labels are 0, 1, 2, 0, …."""

  def __init__(self, count: int):
    self.files = self
    self._count = count

  def __len__(self) -> int:
    return self._count

  def name(self, index: int) -> str:
    return f"{index}.png"

  def load(self, index: int) -> dict[str, Any]:
    image = np.full((SIZE, SIZE, 3), index, np.uint8)
    return {"image": image, "label": np.int32(index % NUM_CLASSES)}

  def leave_out(self, index: int, error: Exception) -> None:
    raise error


def _write_set(
  rng: Rng, folder: Path, shape: tuple[int, ...] = (SIZE, SIZE, 1)
) -> Path:
  """Writes a latent set of two shards."""
  card = {
    "format": latent_card.FORMAT,
    "source": "images",
    "classes": [f"class {i}" for i in range(NUM_CLASSES)],
    "image_size": 64,
    "scaling_factor": 0.18215,
    "shift_factor": 0.0,
    "latent_shape": list(shape),
    "dtype": "float16",
    "num_shards": 2,
  }

  def encode(images: np.ndarray) -> np.ndarray:
    return rng.uniform(0.1, 2, (len(images), 2, 2, *shape)).astype(np.float16)

  latent_set = LatentSet(folder, card, NUM_IMAGES, 2)
  write_latents(latent_set, _Named(NUM_IMAGES), encode, batch_size=4, num_threads=1)
  return folder


# From bytes or from JSON to cases.


def _in_set(name: str, harm: Callable[[bytes, Rng], bytes]) -> Write:
  """A latent set in which a file is harmed."""

  def write(rng: Rng, folder: Path) -> Path:
    _write_set(rng, folder)
    file = sorted(folder.glob(name))[0]
    file.write_bytes(harm(file.read_bytes(), rng))
    return folder

  return write


def _mutated(
  name: str,
  make: Callable[[Rng], bytes],
  harm: Callable[[bytes, Rng], bytes],
  among_others: bool = False,
) -> Write:
  """A file that is harmed, alone or in a folder with a file that is not."""
  return _crafted_file(name, lambda rng: harm(make(rng), rng), among_others)


def _crafted_file(
  name: str, make: Callable[[Rng], bytes], among_others: bool = False
) -> Write:
  """A file of the given bytes, alone or in a folder with a valid file."""

  def write(rng: Rng, folder: Path) -> Path:
    (folder / name).write_bytes(make(rng))
    if not among_others:
      return folder / name
    valid = _array(rng) if name.endswith("npy") else _image("png", rng)
    (folder / name.replace("a_0", "b_1")).write_bytes(valid)
    return folder

  return write


def _with_dataset_json(harm: Callable[[bytes, Rng], bytes]) -> Write:
  """A folder of images with EDM's dataset.json, which is edited."""

  def write(rng: Rng, folder: Path) -> Path:
    names = [f"00000/img{i}.png" for i in range(3)]
    (folder / "00000").mkdir()
    for name in names:
      (folder / name).write_bytes(_image("png", rng))
    labels = {"labels": [[name, i] for i, name in enumerate(names)]}
    (folder / "dataset.json").write_bytes(harm(json.dumps(labels).encode(), rng))
    return folder

  return write


def _crafted_set(change: Callable[[Path, Rng], None]) -> Write:
  def write(rng: Rng, folder: Path) -> Path:
    change(_write_set(rng, folder), rng)
    return folder

  return write


# Latent sets.


def _card(folder: Path, **changes: Any) -> None:
  path = folder / "card.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _shards(folder: Path) -> list[Path]:
  return sorted(folder.glob("*.array_record"))


def _zeros_of_the_right_size(folder: Path, rng: Rng) -> None:
  path = _shards(folder)[0]
  path.write_bytes(bytes(path.stat().st_size))


def _shard_of_another_set(folder: Path, rng: Rng) -> None:
  other = _write_set(rng, folder / "other", (SIZE, SIZE, 2))
  shutil.copy(_shards(other)[0], _shards(folder)[0])
  size = _shards(folder)[0].stat().st_size
  card = json.loads((folder / "card.json").read_text())
  card["shards"][0]["bytes"] = size
  _card(folder, shards=card["shards"])


def _same_shard_twice(folder: Path, rng: Rng) -> None:
  shutil.copy(_shards(folder)[0], _shards(folder)[1])


def _deep_json(folder: Path, rng: Rng) -> None:
  (folder / "card.json").write_text("[" * 200_000)


def _long_number(folder: Path, rng: Rng) -> None:
  text = (folder / "card.json").read_text()
  (folder / "card.json").write_text(text.replace("0.18215", "1" * 100_000))


def _shard_is_a_folder(folder: Path, rng: Rng) -> None:
  path = _shards(folder)[0]
  path.unlink()
  path.mkdir()


def _shard_elsewhere(folder: Path, rng: Rng) -> None:
  card = json.loads((folder / "card.json").read_text())
  card["shards"][0]["file"] = str(rng.choice(["/dev/zero", "/etc/passwd", "../x", "."]))
  _card(folder, shards=card["shards"])


_CRAFTED_SETS: dict[str, Callable[[Path, Rng], None]] = {
  "set_no_shards": lambda folder, rng: _card(folder, shards=[]),
  "set_no_classes": lambda folder, rng: _card(folder, classes=[]),
  "set_one_class": lambda folder, rng: _card(folder, classes=["a"]),
  "set_huge_shape": lambda folder, rng: _card(folder, latent_shape=[10**9] * 3),
  "set_negative_shape": lambda folder, rng: _card(folder, latent_shape=[-8, -8, 1]),
  "set_nan_shape": lambda folder, rng: _card(folder, latent_shape=[float("nan")] * 3),
  "set_zeros": _zeros_of_the_right_size,
  "set_other_shard": _shard_of_another_set,
  "set_same_shard_twice": _same_shard_twice,
  "set_deep_json": _deep_json,
  "set_long_number": _long_number,
  "set_shard_is_a_folder": _shard_is_a_folder,
  "set_shard_elsewhere": _shard_elsewhere,
}


# .npy and .npz.


def _header(shape: str, descr: str = "'|u1'", data: bytes = b"") -> bytes:
  """An .npy file with this shape and dtype in its header."""
  text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
  text += " " * (-(len(text) + 11) % 64) + "\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def _pickle(rng: Rng) -> bytes:
  array = np.array([{"a": 1}] * NUM_IMAGES, object)
  return _saved(lambda file: np.save(file, array, allow_pickle=True))


_CRAFTED_NPY: dict[str, Callable[[Rng], bytes]] = {
  "npy_pickle": _pickle,
  "npy_negative_shape": lambda rng: _header("(-1, 8, 8, 1)", data=rng.bytes(768)),
  "npy_seven_terabytes": lambda rng: _header("(109951162777, 8, 8, 1)"),
  "npy_overflowing_shape": lambda rng: _header("(4294967296, 4294967296, 1, 1)"),
  "npy_shape_of_floats": lambda rng: _header("(12.0, 8, 8, 1)"),
  "npy_object_dtype": lambda rng: _header("(12, 8, 8, 1)", "'|O'", rng.bytes(768)),
  "npy_record_dtype": lambda rng: _header(
    "(12, 8, 8, 1)", "[('a', '|O')]", rng.bytes(6144)
  ),
  "npy_wide_dtype": lambda rng: _header("(12, 8, 8, 1)", "'|S2147483647'"),
  "npy_expression": lambda rng: _header("__import__('os').getpid()"),
  "npy_deep_header": lambda rng: _header("(" * 5000),
  "npy_nan": lambda rng: _saved(
    lambda file: np.save(file, np.full((SIZE, SIZE, 1), np.nan, np.float32))
  ),
  "npy_version_9": lambda rng: b"\x93NUMPY\x09\x00" + rng.bytes(100),
  "npy_empty": lambda rng: b"",
}


def _as_member(make: Callable[[Rng], bytes]) -> Callable[[Rng], bytes]:
  """An .npz whose images are the given .npy file."""

  def write(rng: Rng) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
      archive.writestr("arr_0.npy", make(rng))
      archive.writestr("arr_1.npy", _saved(lambda file: np.save(file, _labels())))
    return held.getvalue()

  return write


def _encrypted(rng: Rng) -> bytes:
  data = bytearray(_npz(rng))
  for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
    place = data.find(mark)
    while place >= 0:
      data[place + offset] |= 1
      place = data.find(mark, place + 4)
  return bytes(data)


def _bomb(rng: Rng) -> bytes:
  """An .npz of 30 kB whose labels unpack to 32 MB of another shape."""
  held = io.BytesIO()
  with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("arr_0.npy", _npy(rng))
    header = _header("(4000000,)", "'<i8'")
    archive.writestr("arr_1.npy", header + bytes(32_000_000))
  return held.getvalue()


def _lying_sizes(rng: Rng) -> bytes:
  data = bytearray(_npz(rng))
  place = data.find(b"PK\x01\x02")
  data[place + 20 : place + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
  return bytes(data)


_CRAFTED_NPZ: dict[str, Callable[[Rng], bytes]] = {
  **{f"npz_of_{name}": _as_member(make) for name, make in _CRAFTED_NPY.items()},
  "npz_encrypted": _encrypted,
  "npz_bomb": _bomb,
  "npz_lying_sizes": _lying_sizes,
  "npz_no_arrays": lambda rng: _saved(np.savez),
  "npz_labels_out_of_range": lambda rng: _saved(
    lambda file: np.savez(
      file, arr_0=_images(rng), arr_1=np.full(NUM_IMAGES, 2**62, np.int64)
    )
  ),
  "npz_labels_largest": lambda rng: _saved(
    lambda file: np.savez(
      file, arr_0=_images(rng), arr_1=np.full(NUM_IMAGES, 2**31 - 1, np.int64)
    )
  ),
  "npz_text": lambda rng: b"<html>404 Not Found</html>",
}


# Tar files.


def _tar_header(name: str, size: bytes, kind: bytes = b"0", more: bytes = b"") -> bytes:
  """A block of header with a right checksum."""
  block = bytearray(512)
  block[0 : len(name)] = name.encode()
  block[100:108], block[124:136], block[156:157] = b"0000644\0", size, kind
  block[257:265] = b"ustar\x0000"
  block[345 : 345 + len(more)] = more
  block[148:156] = b" " * 8
  block[148:156] = f"{sum(block):06o}\0 ".encode()
  return bytes(block)


def _with_first(header: bytes, data: bytes = b"") -> Callable[[Rng], bytes]:
  """A tar file that begins with a header of one's own."""
  return lambda rng: header + data + _tar(rng)


def _binary_size(size: int) -> bytes:
  return bytes([0x80]) + size.to_bytes(11, "big")


def _paths_outside(rng: Rng) -> bytes:
  png = _image("png", rng)
  return _members(
    [("/etc/a/1.png", png), ("../../b/2.png", png), ("a/../../3.png", png)]
  )


def _links(rng: Rng) -> bytes:
  held = io.BytesIO()
  with tarfile.open(fileobj=held, mode="w") as archive:
    for name, kind in (("a/1.png", tarfile.SYMTYPE), ("a/2.png", tarfile.LNKTYPE)):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, "/etc/passwd"
      archive.addfile(info)
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE):
      info = tarfile.TarInfo("b/3.png")
      info.type = kind
      archive.addfile(info)
  return held.getvalue() + bytes(1024)


def _pax(text: bytes) -> Callable[[Rng], bytes]:
  """A tar file whose first member has this extended header."""

  def write(rng: Rng) -> bytes:
    padded = text + bytes(-len(text) % 512)
    size = f"{len(text):011o}\0".encode()
    return _tar_header("x", size, b"x") + padded + _tar(rng)

  return write


def _inner_tar(rng: Rng) -> bytes:
  inner = MUTATIONS[str(rng.choice(list(MUTATIONS)))](_tar(rng), rng)
  return _members([("a.tar", _tar(rng)), ("b.tar", inner)])


_CRAFTED_TARS: dict[str, Callable[[Rng], bytes]] = {
  "tar_eight_exabytes": _with_first(_tar_header("a/x.png", _binary_size(2**63 - 1))),
  "tar_beyond_integers": _with_first(_tar_header("a/x.png", _binary_size(2**80))),
  "tar_negative_size": _with_first(_tar_header("a/x.png", b"\xff" * 11 + b"\x00")),
  "tar_seven_terabytes": _with_first(_tar_header("a/x.png", _binary_size(7 * 10**12))),
  "tar_long_name_of_terabytes": _with_first(
    _tar_header("x", _binary_size(7 * 10**12), b"L")
  ),
  "tar_pax_of_terabytes": _with_first(_tar_header("x", _binary_size(7 * 10**12), b"x")),
  "tar_sparse": _with_first(
    _tar_header("a/x.png", b"00000000000\0", b"S", bytes(41) + b"00000000000\0" * 9)
  ),
  "tar_pax_size": _pax(b"26 size=9223372036854775807\n"),
  "tar_pax_length": _pax(b"99999999999999999999 size=1\n"),
  "tar_pax_zero": _pax(b"0 size=1\n"),
  "tar_pax_sparse": _pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
  "tar_pax_name": _pax(b"13 path=a\0b\n\n" + b"27 hdrcharset=BINARY\n"),
  "tar_paths_outside": _paths_outside,
  "tar_links": _links,
  "tar_inner": _inner_tar,
  "tar_of_zeros": lambda rng: bytes(10240),
  "tar_empty": lambda rng: b"",
  "tar_compressed": lambda rng: zlib.compress(_tar(rng)),
  "tar_labels": lambda rng: _members(
    [
      ("0.png", _image("png", rng)),
      (
        "0.cls",
        [b"", b"x", b"-1", b"9" * 5000, b"1e9", b"\xff", b"1" * 9][rng.integers(7)],
      ),
    ]
  ),
}


# Images.


def _chunk(kind: bytes, data: bytes) -> bytes:
  crc = zlib.crc32(kind + data)
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def _png_of(width: int, height: int, data: bytes, *more: bytes) -> bytes:
  """A PNG that claims a size."""
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  chunks = [_chunk(b"IHDR", header), *more, _chunk(b"IDAT", zlib.compress(data))]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _gif_of_terapixels(rng: Rng) -> bytes:
  data = bytearray(_image("gif", rng))
  data[6:10] = b"\xff" * 4
  return bytes(data)


def _tiff_of_terapixels(rng: Rng) -> bytes:
  entries = [(256, 4, 1, 2**31), (257, 4, 1, 2**31), (258, 3, 1, 8), (259, 3, 1, 1)]
  entries += [(262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 2**31)]
  packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
  return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


_CRAFTED_IMAGES: dict[str, Callable[[Rng], bytes]] = {
  "png_of_gigapixels": lambda rng: _png_of(60_000, 60_000, bytes(1000)),
  "png_largest": lambda rng: _png_of(2**31 - 1, 2**31 - 1, bytes(1000)),
  "png_bomb": lambda rng: _png_of(13_000, 13_000, bytes(10_000_000)),
  "png_of_no_pixels": lambda rng: _png_of(0, 0, b""),
  "png_long": lambda rng: _png_of(1_000_000, 1, bytes(1_000_001)),
  "png_text_bomb": lambda rng: _png_of(
    8,
    8,
    bytes(72),
    *[_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 80,
  ),
  "gif_of_terapixels": _gif_of_terapixels,
  "tiff_of_terapixels": _tiff_of_terapixels,
  "postscript": lambda rng: (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
  ),
  "html": lambda rng: b"<html>404 Not Found</html>",
  "empty": lambda rng: b"",
}
