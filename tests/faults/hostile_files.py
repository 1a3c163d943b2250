"""Files of a world, damaged by chance, by hand or by an attacker; drawn from a seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.command_lines import LINES

# What stands in a hand-edited file of settings where something else is expected.
VALUES: list[Any] = [
  *(None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 5000, "../../etc"),
  *([], {}, [[]], [None], {"a": {}}, "NaN", "日本", "gs://bucket", [1, "a"], -(2**63)),
]


def damage_world(world: Path, seed: int) -> tuple[str, list[str], str]:
  """Damages one file of a world that a command reads.

  Args:
    world: folder of `world.make_world`; one of its files is changed or replaced.
    seed: seed of all draws.

  Returns:
    (command, arguments, description of the damage).
  """
  rng = random.Random(seed)
  files = sorted(path for path in world.rglob("*") if path.is_file())
  while True:
    file = rng.choice(files)
    name = str(file.relative_to(world))
    if fitting := list(_lines_that_read(name)):
      break
  command, line = rng.choice(fitting)
  kinds = [*DAMAGES, *[edit_json] * 8] if file.suffix == ".json" else DAMAGES
  kind = rng.choice(kinds)
  kind(file, rng)
  arguments = [text.replace("{W}", str(world)) for text in line.split()]
  return command, arguments, f"{name}: {kind.__name__}"


def _lines_that_read(name: str):
  """(command, line) of the lines that give a file, or a folder above it."""
  above = [name, *map(str, Path(name).parents)][:-1]
  for command, lines in LINES.items():
    for line in lines:
      used = {part.partition("=")[2] for part in line.split()}
      if used & {f"{{W}}/{path}" for path in above}:
        yield command, line


def flip_bits(file: Path, rng: random.Random) -> None:
  content = bytearray(file.read_bytes())
  for _ in range(rng.randint(1, 8) if content else 0):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
  content = file.read_bytes()
  file.write_bytes(content[: rng.randrange(len(content) + 1)])


def empty(file: Path, rng: random.Random) -> None:
  file.write_bytes(b"")


def fill_with_zeros(file: Path, rng: random.Random) -> None:
  file.write_bytes(bytes(file.stat().st_size))


def grow(file: Path, rng: random.Random) -> None:
  file.write_bytes(file.read_bytes() + rng.randbytes(rng.choice([1, 512, 70_000])))


def put_noise(file: Path, rng: random.Random) -> None:
  file.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))


def delete(file: Path, rng: random.Random) -> None:
  file.unlink()


def turn_into_a_folder(file: Path, rng: random.Random) -> None:
  file.unlink()
  file.mkdir()


def turn_into_a_pipe(file: Path, rng: random.Random) -> None:
  file.unlink()
  os.mkfifo(file)


def link_to_itself(file: Path, rng: random.Random) -> None:
  file.unlink()
  file.symlink_to(file.name)


def link_to_endless_zeros(file: Path, rng: random.Random) -> None:
  file.unlink()
  file.symlink_to("/dev/zero")


def copy_another_file(file: Path, rng: random.Random) -> None:
  """Puts a file of the same folder, or of the whole world, in its place."""
  root = next(parent for parent in file.parents if (parent / "config.py").exists())
  folder = rng.choice([file.parent, root])
  others = sorted(path for path in folder.rglob("*") if path.is_file())
  other = rng.choice(others)
  if other != file:
    shutil.copyfile(other, file)


def edit_json(file: Path, rng: random.Random) -> None:
  """Changes, removes, adds or repeats an entry of a JSON file."""
  value = json.loads(file.read_text())
  places = list(_places(value))
  if not places or rng.random() < 0.1:
    value = rng.choice(VALUES)
  else:
    parent, key = rng.choice(places)
    change = rng.choice(["set", "set", "remove", "rename", "repeat"])
    if change == "set":
      parent[key] = rng.choice(VALUES)
    elif change == "remove":
      del parent[key]
    elif isinstance(parent, dict):
      parent[f"{key}_"] = parent.pop(key) if change == "rename" else parent[key]
    else:
      parent.append(parent[key])
  file.write_text(json.dumps(value))


def _places(value: Any):
  """(container, key) of every entry of a JSON value, however deep."""
  if not isinstance(value, dict | list):
    return
  for key in list(value) if isinstance(value, dict) else range(len(value)):
    yield value, key
    yield from _places(value[key])


DAMAGES: list[Callable[[Path, random.Random], None]] = [
  *(flip_bits, cut, empty, fill_with_zeros, grow, put_noise, delete),
  *(turn_into_a_folder, turn_into_a_pipe, link_to_itself, link_to_endless_zeros),
  copy_another_file,
]
