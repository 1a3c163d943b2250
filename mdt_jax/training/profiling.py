"""Traces of training steps, which TensorBoard's profile plugin and xprof open."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mdt_jax.buckets import AnyPath, upload_folder
from mdt_jax.logs import logger
from mdt_jax.settings import Settings
from mdt_jax.training.events import tolerate
from mdt_jax.training.writers import TENSORBOARD

SIGNAL = signal.SIGUSR1
STEPS_OF_SIGNAL = 5


class Profiler:
  """Traces the steps that `config.profile` names, and five steps after a request.

  Args:
    folder: receives plugins/profile/SESSION/HOST.xplane.pb.
    steps: steps to trace, counted from 0; empty for none.
  """

  def __init__(self, folder: AnyPath, steps: range):
    self._folder, self._steps = folder, steps
    self._local: Path | None = None  # receives a trace that goes to a bucket
    self._end: int | None = None  # number of steps done at the end of the trace
    self._is_requested = False

  def request(self) -> None:
    """Traces the next five steps, after the end of a trace that is running."""
    self._is_requested = True

  def starts(self, done: int) -> bool:
    """Whether a trace starts with step `done`, counted from 0."""
    return self._end is None and (self._is_requested or done in self._steps)

  def start(self, done: int, state: Any) -> None:
    """Starts a trace with step `done`; waits for the steps before.

    If the trace cannot start, the later steps of `config.profile` do not try again.
    """
    jax.block_until_ready(state)
    self._end = done + STEPS_OF_SIGNAL if self._is_requested else self._steps.stop
    if done in self._steps:
      self._end = max(self._end, self._steps.stop)
    self._is_requested = False
    with tolerate("a trace"):
      folder = self._folder
      if not isinstance(folder, Path):  # JAX writes local files only
        folder = self._local = Path(tempfile.mkdtemp(prefix="mdt_jax_trace_"))
      jax.profiler.start_trace(folder, profiler_options=_options(done))
      return
    self._end = None
    if done in self._steps:
      self._steps = range(0)
    self._remove_local()

  def stops(self, done: int) -> bool:
    """Whether the trace that is running ends after `done` steps."""
    return self._end is not None and done >= self._end

  def stop(self, state: Any) -> None:
    """Waits for the steps, and writes the trace."""
    jax.block_until_ready(state)
    self.close()

  def close(self) -> None:
    """Writes the trace that is running, if there is one."""
    if self._end is None:
      return
    self._end = None
    with tolerate(f"a trace in {self._folder}"):
      jax.profiler.stop_trace()
      if not isinstance(self._folder, Path) and self._local is not None:
        upload_folder(self._local, self._folder)
        self._remove_local()
      logger.info("wrote a trace: tensorboard --logdir=%s", self._folder)

  def _remove_local(self) -> None:
    """Removes the local folder of a trace that goes to a bucket."""
    local, self._local = self._local, None
    if local is not None:
      shutil.rmtree(local, ignore_errors=True)


@contextlib.contextmanager
def profiling(settings: Settings, workdir: AnyPath) -> Iterator[Profiler]:
  """Yields the profiler of a run; SIGUSR1 requests a trace of the next five steps.

  The signal keeps its effect if the process handles or ignores it already, or if the
  run is not in the main thread.
  """
  steps = settings.profiled_steps
  if settings.profile_processes == "first" and jax.process_index() > 0:
    steps = range(0)
  profiler = Profiler(workdir / TENSORBOARD, steps)
  is_main = threading.current_thread() is threading.main_thread()
  takes_signal = is_main and signal.getsignal(SIGNAL) == signal.SIG_DFL

  def handle(number: int, frame: object) -> None:
    del number, frame
    logger.info("SIGUSR1: tracing the next %d steps", STEPS_OF_SIGNAL)
    profiler.request()

  if takes_signal:
    signal.signal(SIGNAL, handle)
  try:
    yield profiler
  finally:
    if takes_signal:
      signal.signal(SIGNAL, signal.SIG_DFL)
    profiler.close()


def _options(done: int) -> Any:
  """Names the trace after its first step, the same on all hosts of TPUs."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # a trace of every Python call is too long to read
  if hasattr(options, "session_id"):  # else JAX names the session after the time
    options.session_id = f"step_{done:07d}"
    index = jax.process_index()
    # A file has the name of its host; a host of GPUs may run several processes.
    if index > 0 and jax.default_backend() != "tpu":
      options.session_id += f"_process_{index}"
  return options
