"""Training commands that are started by the dozen, to be killed.

They are forked from a server that has imported everything and computed nothing, which
spares each of them the seconds that imports take.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

CONFIG = Path(__file__).with_name("run_config.py")
TIMEOUT = 300  # seconds, of a run of seconds

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "mdt_jax.main", "clu.metric_writers"])


class Run:
  """A command "python -m mdt_jax.main" under way.

  Args:
    workdir: of the run.
    *flags: after --config and --workdir.
    config: file of the config.
    before: called in the process of the run before it begins.
    logs: folder of its output; None for one beside the workdir.
  """

  def __init__(
    self,
    workdir: Path,
    *flags: str,
    config: Path = CONFIG,
    before: Callable[[], None] | None = None,
    logs: Path | None = None,
  ):
    logs = logs or workdir.parent / f"{workdir.name}_logs"
    logs.mkdir(exist_ok=True)
    self.log = logs / f"{time.time_ns()}.txt"
    self.log.touch()
    command = ["mdt_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    self.process = _FORKS.Process(
      target=_main, args=(command, self.log, before), daemon=True
    )
    self.process.start()

  def wait_for(self, pattern: str) -> re.Match[str]:
    """Waits for a line in the log."""
    return self._wait(lambda: re.search(pattern, self.log.read_text(), re.MULTILINE))

  def end(self) -> int:
    """Waits for the end; the exit code, negative for a signal."""
    self.process.join(TIMEOUT)
    assert self.process.exitcode is not None, self.log.read_text()
    return self.process.exitcode

  def kill(self) -> None:
    self.process.kill()
    self.process.join()

  def signal(self, number: int) -> None:
    os.kill(self.process.pid, number)

  def steps(self) -> list[int]:
    """The steps that were logged."""
    return [int(n) for n in re.findall(r"^step (\d+)/", self.log.read_text(), re.M)]

  def _wait(self, condition: Callable[[], re.Match[str] | None]) -> re.Match[str]:
    end = time.monotonic() + TIMEOUT
    while (found := condition()) is None:
      assert self.process.is_alive() and time.monotonic() < end, self.log.read_text()
      time.sleep(0.005)
    return found


def finish(workdir: Path, *flags: str, logs: Path | None = None) -> Run:
  """Runs the command to its end, which has to be good."""
  run = Run(workdir, *flags, logs=logs)
  assert run.end() == 0, run.log.read_text()
  return run


def steps_saved(workdir: Path) -> list[int]:
  """Of the finished checkpoints."""
  names = (path.name for path in (workdir / "checkpoints").glob("*"))
  return sorted(int(name) for name in names if name.isdigit())


def read(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, read without this package."""
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


def record_batches(path: Path) -> None:
  """Writes the rows and the labels of each batch that this process trains on."""
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


def _main(command: list[str], log: Path, before: Callable[[], None] | None) -> None:
  """In the forked process: the command, with its output in a file."""
  output = os.open(log, os.O_WRONLY | os.O_APPEND)
  os.dup2(output, 1)
  os.dup2(output, 2)
  sys.stdout.reconfigure(line_buffering=True)
  from mdt_jax import cli, main

  if before is not None:
    before()
  sys.argv = command
  cli.run(main.main)
