"""Helpers that start, stop and kill training commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests import forked

CONFIG = Path(__file__).with_name("run_config.py")


class Run(forked.Forked):
  """A running `python -m mdt_jax.main`.

  Args:
    workdir: folder of the run.
    *flags: flags after --config and --workdir.
    config: config file.
    before: called in the process before training starts.
    logs: folder for the output; None for a folder beside the workdir.
    environment: variables to set in the process.
  """

  def __init__(
    self,
    workdir: Path,
    *flags: str,
    config: Path = CONFIG,
    before: Callable[[], None] | None = None,
    logs: Path | None = None,
    environment: Mapping[str, str] | None = None,
  ):
    logs = logs or workdir.parent / f"{workdir.name}_logs"
    logs.mkdir(exist_ok=True)
    self.log = logs / f"{time.time_ns()}.txt"
    flags = (f"--config={config}", f"--workdir={workdir}", *flags)
    files = {"out": self.log, "err": self.log}
    super().__init__(_train, before, flags, environment=environment, **files)

  def steps(self) -> list[int]:
    """Returns the logged steps."""
    return [int(n) for n in re.findall(r"^step (\d+)/", self.log.read_text(), re.M)]


def finish(workdir: Path, *flags: str, **options: Any) -> Run:
  """Runs the command and asserts that it succeeds; see `Run` for the options."""
  run = Run(workdir, *flags, **options)
  assert run.end() == 0, run.log.read_text()
  return run


def subprocess_of(workdir: Path, *flags: str) -> subprocess.Popen[str]:
  """Starts the command in a new interpreter, which may start processes of its own."""
  command = [sys.executable, "-m", "mdt_jax.main", f"--config={CONFIG}"]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def steps_saved(workdir: Path) -> list[int]:
  """Returns the steps of the finished checkpoints."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return sorted(int(name) for name in names if name.isdigit())


def read(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """Reads every array of a checkpoint with Orbax only."""
  folder = workdir / "checkpoints" / str(step)
  arrays = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ("state", "ema"):
      tree = checkpointer.restore(folder / item)
      for path, leaf in _leaves(tree):
        arrays[f"{item}/{path}"] = np.asarray(leaf)
  return arrays


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def save_whole_arrays() -> None:
  """Lets one of the devices that hold the same array save it.

  By default, each of them saves a slice, and Orbax compiles a function for each slice.
  """
  handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
  ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def record_batches(path: Path) -> None:
  """Records the rows and labels of each training batch of this process in a file."""
  from mdt_jax import sharding

  put_batch = sharding.put_batch

  def recorded(batch, mesh, batch_size):
    rows = [int(row) for row in sharding.local_rows(mesh, batch_size)]
    with path.open("a") as file:
      file.write(json.dumps([rows, batch["label"].tolist()]) + "\n")
    return put_batch(batch, mesh, batch_size)

  sharding.put_batch = recorded


def _leaves(tree: object, path: str = ""):
  if isinstance(tree, dict):
    for name, branch in tree.items():
      yield from _leaves(branch, f"{path}/{name}")
  elif isinstance(tree, list | tuple):
    for index, branch in enumerate(tree):
      yield from _leaves(branch, f"{path}/{index}")
  elif tree is not None:
    yield path, tree


def _train(before: Callable[[], None] | None, flags: tuple[str, ...]) -> None:
  if before is not None:
    before()
  forked.run_module("mdt_jax.main", *flags)
