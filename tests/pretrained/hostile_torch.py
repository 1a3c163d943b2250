"""Hostile .pt files: pickles, tensors without plain values, and zip files."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.pretrained.hostile_network import (
  BIAS,
  KINDS,
  LARGE,
  WIDTH,
  Kind,
  as_torch,
  network,
)


class Code:
  """Creates a file in the current folder when it is unpickled."""

  def __reduce__(self) -> Any:
    return Path.touch, (Path("hostile_code_ran"),)


class Call:
  """Calls a function when it is unpickled."""

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    self.call = function, arguments

  def __reduce__(self) -> Any:
    return self.call


def _add_torch(
  name: str, make: Callable[[], Any], suffix: str = ".pt", **options
) -> None:
  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / f"model{suffix}"
    with warnings.catch_warnings():  # quantised and sparse tensors warn
      warnings.simplefilter("ignore")
      torch.save(make(), path, **options)
    return path

  KINDS[f"torch_{name}"] = write


def _with(tensor: Any) -> dict[str, Any]:
  return {**as_torch(network()), BIAS: tensor}


def _cyclic() -> dict[str, Any]:
  held: dict[str, Any] = {"epoch": 3}
  held["model"] = held
  return held


def _nested(depth: int) -> Any:
  held: Any = as_torch(network())
  for _ in range(depth):
    held = {"model": held}
  return held


def _quantised() -> torch.Tensor:
  return torch.quantize_per_tensor(torch.ones(4 * WIDTH), 0.1, 0, torch.qint8)


for _name, _make in {
  "valid": lambda: as_torch(network()),
  "valid_parameters": lambda: {
    name: torch.nn.Parameter(tensor) for name, tensor in as_torch(network()).items()
  },
  "sparse_coo": lambda: _with(torch.ones(4, WIDTH).to_sparse()),
  "sparse_csr": lambda: _with(torch.ones(4, WIDTH).to_sparse_csr()),
  "sparse_huge": lambda: _with(
    torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (LARGE,))
  ),
  "meta": lambda: _with(torch.ones(LARGE, device="meta")),
  "quantised": lambda: _with(_quantised()),
  "complex": lambda: _with(torch.ones(4 * WIDTH, dtype=torch.complex64)),
  "float8": lambda: _with(torch.ones(4 * WIDTH).to(torch.float8_e4m3fn)),
  "integers": lambda: _with(torch.ones(4 * WIDTH, dtype=torch.int16)),
  "nan": lambda: _with(torch.full((4 * WIDTH,), float("nan"))),
  "stride_zero": lambda: _with(torch.ones(1).expand(2**20, 2**20)),
  "stride_zero_many": lambda: {
    f"a.{i}": torch.ones(1).expand(2**24) for i in range(100)
  },
  "shared_values": lambda: dict.fromkeys(network(), torch.ones(2**20)),
  "code": lambda: _with(Code()),
  "bytearray": lambda: _with(Call(bytearray, LARGE)),
  "bytearray_outside": lambda: {
    "ema": as_torch(network()),
    "x": Call(bytearray, LARGE),
  },
  "large_tensor": lambda: _with(Call(torch.Tensor, 2**20, 2**20)),
  "names_of_numbers": lambda: {3: torch.ones(1), None: torch.ones(1)},
  "list": lambda: [torch.ones(1)],
  "number": lambda: 5,
  "text": lambda: "x" * 100,
  "empty": dict,
  "empty_ema": lambda: {"ema": {}},
  "ema_of_text": lambda: {"ema": {"a": "b"}, "model": as_torch(network())},
  "cyclic": _cyclic,
  "nested": lambda: _nested(2),
  "nested_deep": lambda: _nested(100),
  "args_of_sit": lambda: {"ema": as_torch(network()), "args": {"model": "SiT-XL/2"}},
  "args_wrong": lambda: {"ema": as_torch(network()), "args": {"num_classes": [1]}},
}.items():
  _add_torch(_name, _make)
_add_torch("bin", lambda: as_torch(network()), ".bin")
_add_torch("wrong_suffix", lambda: as_torch(network()), ".ckpt")
_add_torch("legacy", lambda: as_torch(network()), _use_new_zipfile_serialization=False)
_add_torch("legacy_code", lambda: _with(Code()), _use_new_zipfile_serialization=False)
_add_torch(
  "legacy_bytearray",
  lambda: _with(Call(bytearray, LARGE)),
  _use_new_zipfile_serialization=False,
)


def _add_bytes(name: str, make: Callable[[], bytes], suffix: str = ".pt") -> None:
  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / f"model{suffix}"
    path.write_bytes(make())
    return path

  KINDS[f"bytes_{name}"] = write


def _tuples_of_tuples(zipped: bool, name: str = "data.pkl") -> bytes:
  """A pickle of {x: 1} with x = ((…), (…)), 60 levels deep: its hash takes years."""
  levels = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
  held = b"\x80\x02}N\x85q\0" + levels + b"K\x01s."
  if not zipped:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    return magic + pickle.dumps({}, 2) + held + pickle.dumps([], 2)
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for entry, content in ((name, held), ("version", b"3\n")):
      archive.writestr(zipfile.ZipInfo(f"model/{entry}"), content)
  return file.getvalue()


def _legacy_with_large_storage() -> bytes:
  """The format before torch 1.6, in which a storage has 2**40 values."""
  texts = [b"X%c\0\0\0%s" % (len(text), text) for text in (b"storage", b"0", b"cpu")]
  storage = b"(" + texts[0] + b"ctorch\nFloatStorage\n" + texts[1] + texts[2]
  number = b"\x8a\x06" + LARGE.to_bytes(6, "little")
  rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
  tensor = rebuild + storage + number + b"NtQK\0" + b"(K\x02t(K\x01t"
  tensor += b"\x89ccollections\nOrderedDict\n)RtR"
  magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
  system = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
  held = b"\x80\x02}X\x09\0\0\0pos_embed" + tensor + b"s."
  return magic + system + held + pickle.dumps(["0"], 2) + struct.pack("<q", LARGE)


for _name, _make in {
  "empty": lambda: b"",
  "zeros": lambda: b"\0" * 4096,
  "text": lambda: b"hello\nand\nmore",
  "web_page": lambda: b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
  "lfs_pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
  "no_newline": lambda: b"c" + b"x" * 10**6,
  "pickle": lambda: pickle.dumps({"a": [1.0]}),
  "pickle_code": lambda: pickle.dumps(Code()),
  "pickle_long_text": lambda: b"\x80\x02X\xff\xff\xff\xff" + b"x" * 100 + b".",
  "pickle_large_memo": lambda: b"\x80\x02Nr\xff\xff\xff\xff.",
  "pickle_endless_marks": lambda: b"\x80\x02" + b"(" * 10**5 + b".",
  "gzip": lambda: b"\x1f\x8b" + zlib.compress(b"x" * 100),
  "tar": lambda: b"model.pt" + b"\0" * 249 + b"ustar" + b"\0" * 1000,
  "magic_of_zip": lambda: b"PK\x03\x04" + b"\0" * 100,
  "end_of_zip": lambda: b"PK\x05\x06" + b"\0" * 18,
  "end_of_zip_lies": lambda: b"PK\x05\x06" + b"\xff" * 16 + b"\0\0",
  "tuples_of_tuples": lambda: _tuples_of_tuples(zipped=True),
  "tuples_of_tuples_in_capitals": lambda: _tuples_of_tuples(True, "DATA.PKL"),
  "legacy_tuples_of_tuples": lambda: _tuples_of_tuples(zipped=False),
  "legacy_large_storage": _legacy_with_large_storage,
}.items():
  _add_bytes(_name, _make)
_add_bytes("npz", lambda: b"PK\x05\x06" + b"\0" * 18, ".npz")
_add_bytes("text_safetensors", lambda: b"<!DOCTYPE html>", ".safetensors")


def _add_zip(name: str, entries: list[tuple[str, bytes, int]]) -> None:
  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
      for entry, content, compression in entries:
        # A ZipInfo has a fixed date.
        file.writestr(zipfile.ZipInfo(entry), content, compress_type=compression)
    return path

  KINDS[f"zip_{name}"] = write


_PICKLE = pickle.dumps({"a": 1}, 2)
_DEFLATED, _LZMA = zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA
# Name -> (name, content, compression) of each entry.
for _name, _entries in {
  "without_entries": [],
  "without_pickle": [("model/data/0", b"\0" * 64, 0)],
  "of_a_number": [("model/data.pkl", pickle.dumps(5, 2), 0)],
  "bomb": [("model/data.pkl", b"x" * 2**26, _DEFLATED)],
  "bomb_beside_pickle": [
    ("model/data.pkl", _PICKLE, 0),
    ("model/data/0", bytes(2**26), _DEFLATED),
  ],
  "lzma": [("model/data.pkl", _PICKLE, _LZMA)],
  "path_outside": [("../../data.pkl", _PICKLE, 0)],
  "twice": [("a/data.pkl", _PICKLE, 0), ("b/data.pkl", _PICKLE, 0)],
}.items():
  _add_zip(_name, _entries)


def _edited_zip(edit: Callable[[bytearray, zipfile.ZipInfo], None]) -> Kind:
  """A torch file whose largest entry is changed by `edit`."""

  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / "model.pt"
    torch.save(as_torch(network()), path)
    with zipfile.ZipFile(path) as file:
      entry = max(file.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    edit(content, entry)
    path.write_bytes(content)
    return path

  return write


def _central(content: bytearray, entry: zipfile.ZipInfo) -> int:
  """Offset of the entry in the central directory."""
  name = content.rindex(entry.filename.encode())
  return content.rindex(b"PK\x01\x02", 0, name)


def _lie_about_size(content: bytearray, entry: zipfile.ZipInfo) -> None:
  for at in (_central(content, entry) + 20, _central(content, entry) + 24):
    content[at : at + 4] = struct.pack("<I", 2**32 - 2)


def _lie_about_place(content: bytearray, entry: zipfile.ZipInfo) -> None:
  at = _central(content, entry) + 42
  content[at : at + 4] = struct.pack("<I", 2**31)


def _encrypt(content: bytearray, entry: zipfile.ZipInfo) -> None:
  content[_central(content, entry) + 8] |= 1
  content[entry.header_offset + 6] |= 1


def _change_value(content: bytearray, entry: zipfile.ZipInfo) -> None:
  content[entry.header_offset + 200] ^= 255


KINDS["zip_size_lies"] = _edited_zip(_lie_about_size)
KINDS["zip_place_lies"] = _edited_zip(_lie_about_place)
KINDS["zip_encrypted"] = _edited_zip(_encrypt)
KINDS["zip_flipped"] = _edited_zip(_change_value)
