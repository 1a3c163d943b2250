"""Functions and commands in processes of their own, forked from a server.

The server imports what the commands import (JAX, Orbax, TensorBoard), which takes a new
process several seconds. It computes nothing, so that a forked process still chooses its
devices. A test of what a module imports needs a new interpreter instead.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds, of a process that takes seconds

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
  [
    __name__,
    "mdt_jax.cli",
    "mdt_jax.evaluation.job",
    "mdt_jax.planning",
    "mdt_jax.training.event_files",
    "mdt_jax.training.loop",
    "pytest",  # by functions of test modules
    "sklearn.datasets",  # by the digits
    "sklearn.metrics",
    "sklearn.svm",
  ]
)


class Forked:
  """A function that runs in a process of its own.

  Args:
    target: a function of a module, found there by name.
    *arguments: of the function.
    environment: variables to set. Variables that JAX reads at import have no effect.
    num_devices: CPU devices that JAX shows the process; None for one.
    folder: working directory.
    out: file to append the standard output to; None for a temporary one.
    err: the same for the standard error.
  """

  def __init__(
    self,
    target: Callable[..., None],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    num_devices: int | None = None,
    folder: Path = ROOT,
    out: Path | None = None,
    err: Path | None = None,
  ):
    self._files = tempfile.TemporaryDirectory(prefix="forked_")
    self._out = out or Path(self._files.name, "out")
    self._err = err or Path(self._files.name, "err")
    self._out.touch()
    self._err.touch()
    setup = (environment or {}, num_devices, folder, self._out, self._err)
    # Daemons end with the tests. They cannot start processes of multiprocessing.
    self._process = _SERVER.Process(
      target=_run, args=(setup, target, arguments), daemon=True
    )
    self._process.start()

  @property
  def pid(self) -> int:
    return self._process.pid

  @property
  def out(self) -> str:
    """What the process has printed so far."""
    return self._out.read_text()

  @property
  def err(self) -> str:
    return self._err.read_text()

  def end(self, timeout: float = TIMEOUT) -> int:
    """Waits for the end; returns the exit code, negative for a signal."""
    self._process.join(timeout)
    if self._process.exitcode is None:
      self.signal(signal.SIGABRT)  # adds the stacks of all threads to the output
      self._process.join(10)
      raise AssertionError(f"no end within {timeout} s: {self.out}{self.err}")
    return self._process.exitcode

  def is_alive(self) -> bool:
    return self._process.is_alive()

  def wait_for(self, pattern: str) -> re.Match[str]:
    """Waits until the output holds a regular expression."""
    end = time.monotonic() + TIMEOUT
    while (found := re.search(pattern, self.out, re.MULTILINE)) is None:
      alive = self.is_alive() and time.monotonic() < end
      assert alive, self.out + self.err
      time.sleep(0.005)
    return found

  def signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def kill(self) -> None:
    self._process.kill()
    self._process.join()


def command(module: str, *flags: object, **options: Any) -> Forked:
  """Starts "python -m MODULE FLAG …"; see `Forked` for the options."""
  return Forked(run_module, module, *map(str, flags), **options)


def run_module(module: str, *flags: str) -> None:
  """Runs a module as python -m does."""
  sys.argv = [module, *flags]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def free_address() -> str:
  """HOST:PORT at which nothing listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def _run(setup: tuple, target: Callable[..., None], arguments: tuple) -> None:
  environment, num_devices, folder, out, err = setup
  for path, stream in ((out, 1), (err, 2)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
  sys.stdout.reconfigure(line_buffering=True)
  # A shell that starts the tests in the background has SIGINT ignored.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.chdir(folder)
  os.environ.update(environment)
  if num_devices is not None:
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
  faulthandler.enable()  # for the SIGABRT of `end`
  try:
    target(*arguments)
  finally:
    # As the interpreter does at its end: threads first. A thread that still writes to a
    # bucket needs the event loop that an exit function stops.
    threading._shutdown()
    atexit._run_exitfuncs()  # multiprocessing skips them; jax.distributed needs them
