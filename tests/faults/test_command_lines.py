"""Hostile command lines and files: one line each, soon, and nothing written."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest

from mdt_jax.exit_codes import EXIT_BAD_SETTING, EXIT_TRY_AGAIN
from tests import forked
from tests.data import hostile_data
from tests.faults.command_lines import command_lines
from tests.faults.hostile_files import damage_world
from tests.faults.limits import limited
from tests.faults.world import make_world, snapshot
from tests.pretrained import hostile_weights

SECONDS = 300  # A command that takes longer hangs, on a busy machine too.
LINES_IN_A_TEST = 10
# Setting of `hostile_data` -> command and its other flags; {W} is a world.
LINES_WITH_DATA = {
  "--config.data.path": ("main", "--config={W}/config.py", "--workdir={W}/new"),
  "--features": ("encode", "--output={W}/out"),
  "--samples": ("evaluate", "--reference={W}/samples.npz", "--output={W}/out"),
  "--reference": ("evaluate", "--samples={W}/samples.npz", "--output={W}/out"),
}
# Progress bars and notices, which may precede the line of an error.
NOTICE = re.compile(r"image/s|\d+%\||it/s|\?it|Warning|^\s*warnings\.warn|^[WIE]\d{4} ")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("fuzz") / "world"
  make_world(folder)
  return folder


def problem_of(command: str, arguments: list[str], world: Path) -> str | None:
  """Runs a command and returns what is wrong with its behaviour; None if nothing is."""
  before = snapshot(world)
  process = forked.Forked(
    limited,
    f"mdt_jax.{command}",
    *arguments,
    folder=world,
    environment={"HF_HUB_OFFLINE": "1"},
  )
  start = time.monotonic()
  while process.is_alive():
    if time.monotonic() - start > SECONDS:
      process.kill()
      return f"hangs:\n{process.out}{process.err}"
    time.sleep(0.005)
  code, out, err = process.end(), process.out, process.err
  lines = [
    line for line in err.splitlines() if line.strip() and not NOTICE.search(line)
  ]
  if "Traceback" in out + err:
    return f"gives a traceback:\n{err}"
  if code not in (0, 1, EXIT_BAD_SETTING, EXIT_TRY_AGAIN):
    return f"ends with {code}:\n{out}{err}"
  if code == 0:
    return None
  if not lines or not lines[-1].startswith("error: "):
    return f"ends with {code} and without an error in one line:\n{err}"
  if len(lines) > 1:
    return f"ends with {code} and {len(lines)} lines:\n{err}"
  if code == EXIT_BAD_SETTING and snapshot(world) != before:
    changed = before.items() ^ snapshot(world).items()
    return f"is refused, but changes {sorted({path for path, _ in changed})}:\n{err}"
  return None


@pytest.fixture
def worlds(world, tmp_path):
  """Ten numbers and copies of the world, which follow those of the test before."""

  def make(fault):
    first = fault * LINES_IN_A_TEST
    for number in range(first, first + LINES_IN_A_TEST):
      copy = tmp_path / "worlds" / str(number)
      shutil.copytree(world, copy, symlinks=True)
      yield number, copy
      shutil.rmtree(copy)

  return make


def assert_none(problems):
  assert not problems, "\n\n".join(problems)


@pytest.mark.faults(short=1, whole=64)
def test_command_line_ends_in_one_line_and_is_refused_without_a_trace(worlds, fault):
  problems = []
  for number, copy in worlds(fault):
    ((command, arguments),) = command_lines(copy, number, 1)
    if (problem := problem_of(command, arguments, copy)) is not None:
      problems.append(f"{command} {arguments!r} {problem}")
  assert_none(problems)


@pytest.mark.faults(short=1, whole=26)
def test_damaged_file_is_used_or_refused_in_one_line(worlds, fault):
  problems = []
  for number, copy in worlds(fault):
    command, arguments, damage = damage_world(copy, number)
    if (problem := problem_of(command, arguments, copy)) is not None:
      problems.append(f"{damage}: {command} {arguments!r} {problem}")
  assert_none(problems)


@pytest.mark.faults(short=1, whole=14)
def test_hostile_weights_are_refused_in_one_line(worlds, tmp_path, fault):
  problems = []
  for number, copy in worlds(fault):
    (path,) = hostile_weights.files(tmp_path / "weights", 1, 1, first=number)
    flags = [f"--input={path}", f"--output={copy}/out", "--num_heads=2"]
    if (problem := problem_of("convert", flags, copy)) is not None:
      problems.append(f"{path}: {problem}")
  assert_none(problems)


@pytest.mark.faults(short=1, whole=26)
def test_hostile_data_are_refused_in_one_line(worlds, tmp_path, fault):
  problems = []
  for number, copy in worlds(fault):
    ((setting, path),) = hostile_data.cases(tmp_path / "data", 1, 1, first=number)
    command, *more = LINES_WITH_DATA[setting]
    flags = [*hostile_data.flags(setting, path), *(f.format(W=copy) for f in more)]
    if (problem := problem_of(command, flags, copy)) is not None:
      problems.append(f"{path}: {command} {flags} {problem}")
  assert_none(problems)
