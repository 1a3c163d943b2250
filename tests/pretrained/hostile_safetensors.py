"""Hostile .safetensors files: a length, a JSON header, and values."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.pretrained.hostile_network import BIAS, KINDS, LARGE, WIDTH, changed, network


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
  """The bytes of a .safetensors file with any header, and any length of it."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return struct.pack("<Q", length) + text + data


def layout(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
  """(header, data) of valid tensors."""
  names = {"float32": "F32", "float64": "F64", "int8": "I8", "bool": "BOOL"}
  header: dict[str, Any] = {}
  data = b""
  for name, array in tensors.items():
    header[name] = {
      "dtype": names[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [len(data), len(data) + array.nbytes],
    }
    data += array.tobytes()
  return header, data


def _add_safetensors(name: str, make: Callable[[], bytes]) -> None:
  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(make())
    return path

  KINDS[f"safetensors_{name}"] = write


def _with_entry(name: str, **entry: Any) -> bytes:
  """A valid file in which the header of one tensor is changed."""
  header, data = layout(network())
  header[name] = {**header[name], **entry}
  return safetensors(header, data)


def _tensors(tensors: Mapping[str, np.ndarray], **metadata: Any) -> bytes:
  header, data = layout(tensors)
  return safetensors(
    {**({"__metadata__": metadata} if metadata else {}), **header}, data
  )


def _duplicate_keys() -> bytes:
  header, data = layout(network())
  text = json.dumps(header)
  return safetensors((text[:-1] + ", " + text[1:]).encode(), data)


def _text(position: int, character: bytes) -> bytes:
  header, data = layout(network())
  text = json.dumps(header).encode()
  return safetensors(text[:position] + character + text[position:], data)


for _name, _entry in {
  "float8": dict(dtype="F8_E4M3", data_offsets=[0, 32]),
  "dtype_unknown": dict(dtype="F7"),
  "dtype_number": dict(dtype=5),
  "dtype_complex": dict(dtype="C64"),
  "dtype_other_size": dict(dtype="F64"),
  "offsets_overlap": dict(data_offsets=[0, 128]),
  "offsets_outside": dict(data_offsets=[2**40, 2**40 + 128]),
  "offsets_reversed": dict(data_offsets=[128, 0]),
  "offsets_negative": dict(data_offsets=[-128, 0]),
  "offsets_huge": dict(data_offsets=[10**30, 10**30 + 128]),
  "offsets_floats": dict(data_offsets=[0.5, 128.5]),
  "offsets_one": dict(data_offsets=[0]),
  "shape_overflows": dict(shape=[2**32, 2**32]),
  "shape_huge_and_zero": dict(shape=[2**62, 0]),
  "shape_negative": dict(shape=[-32]),
  "shape_nested": dict(shape=[[32]]),
  "shape_text": dict(shape="32"),
  "shape_long": dict(shape=[1] * 5000 + [32]),
}.items():
  _add_safetensors(_name, lambda entry=_entry: _with_entry(BIAS, **entry))
for _name, _content in {
  "empty": b"",
  "seven_bytes": b"\0" * 7,
  "length_8_exabytes": safetensors({}, length=2**63 - 1),
  "length_16_exabytes": safetensors({}, length=2**64 - 1),
  "length_99_megabytes": safetensors({}, length=99_000_000),
  "length_zero": safetensors({}, length=0),
  "header_not_json": safetensors(b"{'a': 1}"),
  "header_list": safetensors([1, 2]),
  "header_null": safetensors(None),
  "header_number": safetensors(b"1" * 5000),
  "header_nested": safetensors(b"[" * 100_000),
  "header_bom": safetensors(b"\xef\xbb\xbf{}"),
  "header_empty": safetensors({}),
  "entry_null": safetensors({"pos_embed": None}),
  "entry_list": safetensors({"pos_embed": [1]}),
  "metadata_nested": safetensors({"__metadata__": {"a": {"b": 1}}}),
  "name_control": safetensors(
    {"\0\n\x1b[2J": dict(dtype="F32", shape=[], data_offsets=[0, 4])}, b"\0" * 4
  ),
  "name_surrogate": safetensors(
    b'{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}', b"\0" * 4
  ),
  "name_long": safetensors(
    {"x" * 10**6: dict(dtype="F32", shape=[], data_offsets=[0, 4])}, b"\0" * 4
  ),
  "many_names": safetensors(
    {f"a.{i}": dict(dtype="F32", shape=[0], data_offsets=[0, 0]) for i in range(30_000)}
  ),
}.items():
  _add_safetensors(_name, lambda content=_content: content)
for _name, _make in {
  "valid": lambda: _tensors(network()),
  "name_not_utf8": lambda: _text(3, b"\xff\xfe"),
  "duplicate_keys": _duplicate_keys,
  "trailing_values": lambda: _tensors(network()) + b"\0" * 64,
  "nan": lambda: _tensors(changed(BIAS, np.full(4 * WIDTH, np.nan, np.float32))),
  "infinite": lambda: _tensors(changed(BIAS, np.full(4 * WIDTH, np.inf, np.float32))),
  "too_large_for_float32": lambda: _tensors(changed(BIAS, np.full(4 * WIDTH, 1e300))),
  "integers": lambda: _tensors(changed(BIAS, np.ones(4 * WIDTH, np.int8))),
  "booleans": lambda: _tensors(changed(BIAS, np.ones(4 * WIDTH, bool))),
  "no_positions": lambda: _tensors(changed("pos_embed", np.ones((1, 10**7, 0)))),
  "many_positions": lambda: _tensors(
    changed("pos_embed", np.ones((1, 10**5, 1), np.float32))
  ),
  "many_tokens_with_bias": lambda: _tensors(
    {
      **network(),
      "pos_embed": np.ones((1, 40_000, WIDTH), np.float32),
      "decoder_pos_embed": np.ones((1, 40_000, WIDTH), np.float32),
      "blocks.0.attn.rel_pos_bias.relative_position_bias_table": np.ones(
        (399**2 + 3, 2), np.float32
      ),
    }
  ),
  "patches_of_no_size": lambda: _tensors(
    changed("x_embedder.proj.weight", np.ones((10**9, 0, 2, 2), np.float32))
  ),
  "patches_not_square": lambda: _tensors(
    changed("x_embedder.proj.weight", np.ones((WIDTH, 4, 1, 4), np.float32))
  ),
  "scalars": lambda: _tensors(
    {name: np.float32(1)[()] * np.ones(()) for name in network()}
  ),
  "block_without_number": lambda: _tensors(changed("blocks.", np.ones(1, np.float32))),
  "block_of_large_number": lambda: _tensors(
    changed("blocks.99999999999.mlp.fc1.bias", np.ones(1, np.float32))
  ),
  "mdt_without_blocks": lambda: _tensors(
    changed("de_blocks.0.attn.qkv.weight", np.ones(1, np.float32))
  ),
  "diffusers_without_positions": lambda: _tensors(
    {
      "transformer_blocks.0.norm1.linear.bias": np.ones(48, np.float32),
      "pos_embed.proj.weight": np.ones((WIDTH, 4, 2, 2), np.float32),
    }
  ),
  "notes_not_json": lambda: _tensors(network(), mdt_jax="{"),
  "notes_wrong": lambda: _tensors(
    network(), mdt_jax='{"num_heads": -1, "num_classes": [3], "decode_depth": 1e308}'
  ),
  "notes_huge": lambda: _tensors(
    network(), mdt_jax='{"num_heads": 100000000000000000000, "num_classes": 3}'
  ),
}.items():
  _add_safetensors(_name, _make)


def _sparse_terabyte(folder: Path, rng: np.random.Generator) -> Path:
  """A file of 1 TiB that takes no space: holes on the disk."""
  path = folder / "model.safetensors"
  entry = dict(dtype="F32", shape=[LARGE // 4], data_offsets=[0, LARGE])
  content = safetensors({"pos_embed": entry})
  path.write_bytes(content)
  os.truncate(path, len(content) + LARGE)
  return path


KINDS["safetensors_terabyte"] = _sparse_terabyte
