"""Hostile files of weights, drawn from a seed: for tests of readers and commands.

A reader must read each file or refuse it in one line, within seconds and without much
memory. Each kind of file is a function that writes one; mutations damage the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# These modules add their kinds to KINDS.
from tests.pretrained import hostile_safetensors, hostile_torch
from tests.pretrained.hostile_network import KINDS

__all__ = ["KINDS", "files", "hostile_safetensors", "hostile_torch", "one"]


def files(folder: Path, seed: int, count: int, first: int = 0) -> list[Path]:
  """Writes hostile files of weights.

  Args:
    folder: folder to write into; created if needed.
    seed: seed of all draws.
    count: number of files. The first ones are one of each kind; the others are files of
      random kinds with one to three random mutations.
    first: number of the first file, to write the files of a seed in several calls.

  Returns:
    Paths to pass to a reader. Some are folders, pipes, links or do not exist.
  """
  paths = []
  for i in range(first, first + count):
    rng = np.random.default_rng([seed, i])
    name = list(KINDS)[i] if i < len(KINDS) else str(rng.choice(list(KINDS)))
    place = folder / f"{i:04d}_{name}"
    place.mkdir(parents=True)
    path = KINDS[name](place, rng)
    if i >= len(KINDS) and _is_small(path):
      for mutation in rng.choice(list(MUTATIONS), rng.integers(1, 4)):
        path.write_bytes(MUTATIONS[mutation](path.read_bytes(), rng))
    paths.append(path)
  return paths


def one(folder: Path, name: str) -> Path:
  """Writes the file of one kind, undamaged; see `files`."""
  return KINDS[name](folder, np.random.default_rng(0))


def _is_small(path: Path) -> bool:
  return os.path.isfile(path) and path.stat().st_size < 2**24


# Mutations: bytes -> damaged bytes.


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
  changed = bytearray(content)
  for _ in range(int(rng.integers(1, 9)) if changed else 0):
    changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
  return bytes(changed)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
  return content[: int(rng.integers(len(content) + 1))]


def _zero(content: bytes, rng: np.random.Generator) -> bytes:
  start = int(rng.integers(len(content) + 1))
  length = min(len(content) - start, int(rng.integers(1, 4096)))
  return content[:start] + bytes(length) + content[start + length :]


def _grow(content: bytes, rng: np.random.Generator) -> bytes:
  start = int(rng.integers(len(content) + 1))
  return content[:start] + rng.bytes(int(rng.integers(1, 4096))) + content[start:]


def _edit_header(content: bytes, rng: np.random.Generator) -> bytes:
  """Replaces a number in the first 4 KB, where formats keep sizes and offsets."""
  start, size = int(rng.integers(min(len(content), 4096) + 1)), int(rng.integers(1, 9))
  numbers = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
  number = int(numbers[int(rng.integers(len(numbers)))]) % 256**size
  return content[:start] + number.to_bytes(size, "little") + content[start + size :]


MUTATIONS = {
  "flip": _flip,
  "cut": _cut,
  "zero": _zero,
  "grow": _grow,
  "edit_header": _edit_header,
}


# Paths that are no files.


def _add_path(name: str, suffix: str, make: Callable[[Path], Any]) -> None:
  def write(folder: Path, rng: np.random.Generator) -> Path:
    path = folder / f"model{suffix}"
    make(path)
    return path

  KINDS[f"path_{name}"] = write


_add_path("pipe", ".safetensors", os.mkfifo)
_add_path("pipe_torch", ".pt", os.mkfifo)
_add_path("folder", ".safetensors", Path.mkdir)
_add_path("folder_without_suffix", "", Path.mkdir)
_add_path("device", ".pt", lambda path: path.symlink_to("/dev/zero"))
_add_path("device_safetensors", ".safetensors", lambda p: p.symlink_to("/dev/zero"))
_add_path("dangling_link", ".pt", lambda path: path.symlink_to("absent"))
_add_path("link_to_itself", ".pt", lambda path: path.symlink_to(path.name))
_add_path("absent", ".pt", lambda path: None)
KINDS["path_too_long"] = lambda folder, rng: folder / ("x" * 300 + ".pt")
