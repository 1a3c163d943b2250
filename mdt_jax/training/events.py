"""Metrics and pictures for the writers of a run; a failed write does not stop the run.

The writers of the package (`writers.open_events`) write in threads of their own, so
that a slow disk or network does not delay a training step.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mdt_jax.errors import one_line
from mdt_jax.logs import logger

SECONDS_BETWEEN_TRIES = 60.0
SECONDS_TO_CLOSE = 30.0  # time for the last writes of a run
MAX_WAITING = 1000  # calls that wait for a slow writer; later calls are dropped


class Bars(NamedTuple):
  """A bar chart as numbers.

  Attributes:
    edges: (N + 1,) increasing edges of the bars.
    heights: (N,) heights; NaN for a bar without a value.
  """

  edges: np.ndarray
  heights: np.ndarray


class Writer(Protocol):
  """Interface of a writer of metrics, such as the metric writers of clu."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics.

    Args:
      step: number of training steps done.
      scalars: metric by name.
    """

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes images.

    Args:
      step: number of training steps done.
      images: uint8 images (N, H, W, C) by name.
    """


class OwnWriter(Writer, Protocol):
  """A writer of the package, which `Background` opens and closes."""

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """Writes bar charts by name, after `step` training steps."""

  def close(self) -> None:
    """Writes what is not written yet, and releases the file or the connection."""


# Opens a writer. The argument is the step that the run starts or resumes from, whose
# later metrics are no longer valid; None if all earlier metrics stay valid.
Open = Callable[[int | None], OwnWriter]


class Background:
  """Calls a writer in a thread of its own, and reopens a writer that fails.

  After a failed call, the metrics of the next `SECONDS_BETWEEN_TRIES` are dropped.

  Args:
    what: name of what the writer writes, for the log.
    open_writer: opens the writer, in the thread.
    start: number of steps done at the start of the run.
  """

  def __init__(self, what: str, open_writer: Open, start: int):
    self._what, self._open = what, open_writer
    # Calls, and whether a call is dropped after a failure; None at the end.
    self._calls: queue.Queue[tuple[Callable[[], object], bool] | None]
    self._calls = queue.Queue(MAX_WAITING)
    self._writer: OwnWriter | None = None
    self._resumes_from: int | None = start  # passed to the next opened writer
    self._not_before = 0.0  # time.monotonic() of the next try
    self._is_behind = False
    self._thread = threading.Thread(target=self._run, name=what, daemon=True)
    self._thread.start()
    self._put(self._opened)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """See `Writer`; returns at once."""
    self._put(lambda: self._opened().write_scalars(step, scalars))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """See `Writer`; returns at once. Do not change the images afterwards."""
    self._put(lambda: self._opened().write_images(step, images))

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """See `OwnWriter`; returns at once. Do not change the bars afterwards."""
    self._put(lambda: self._opened().write_bars(step, bars))

  def go_back(self, step: int) -> None:
    """Makes the writer forget the metrics of later steps than `step`."""

    def reopen() -> None:
      self._resumes_from = step
      self._close()

    self._put(reopen, is_write=False)

  def close(self) -> None:
    """Waits for the writes, for at most `SECONDS_TO_CLOSE`, and closes the writer."""
    end = time.monotonic() + SECONDS_TO_CLOSE
    with contextlib.suppress(queue.Full):
      self._calls.put(None, timeout=SECONDS_TO_CLOSE)
    self._thread.join(max(0.0, end - time.monotonic()))
    if self._thread.is_alive():
      logger.error(
        "NOT WRITTEN: %s: the last writes take more than %g s",
        self._what,
        SECONDS_TO_CLOSE,
      )

  def _put(self, call: Callable[[], object], is_write: bool = True) -> None:
    """Hands a call to the thread."""
    try:
      self._calls.put_nowait((call, is_write))
    except queue.Full:
      if not self._is_behind:
        logger.error("NOT WRITTEN: %s: earlier writes take too long", self._what)
      self._is_behind = True
    else:
      self._is_behind = False

  def _run(self) -> None:
    """Makes the calls, in order."""
    while (found := self._calls.get()) is not None:
      call, is_write = found
      if is_write and time.monotonic() < self._not_before:
        continue
      with tolerate(self._what):
        try:
          call()
        except Exception:
          # A writer that failed once may fail forever. Closing it ends its threads and
          # connections; what fails then has the same cause.
          with contextlib.suppress(Exception):
            self._close()
          self._not_before = time.monotonic() + SECONDS_BETWEEN_TRIES
          raise
    with tolerate(self._what):
      self._close()

  def _opened(self) -> OwnWriter:
    """The writer, which is opened if there is none."""
    if self._writer is None:
      self._writer = self._open(self._resumes_from)
      self._resumes_from = None
    return self._writer

  def _close(self) -> None:
    """Closes the writer, if there is one."""
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.close()


class Events:
  """Hands metrics and pictures to all writers of a run.

  An exception of a writer is logged and not raised.

  Args:
    own: the writers of the package; `close` closes them.
    writers: further writers that receive the same scalars and images, in the thread of
      the caller; `close` does not close them.
  """

  def __init__(self, own: Sequence[Background] = (), writers: Sequence[Writer] = ()):
    self._own = own
    self._writers = writers

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics by name, after `step` steps."""
    for own in self._own:
      own.write_scalars(step, dict(scalars))
    for writer in self._writers:
      with tolerate(f"scalars by {type(writer).__name__}"):
        writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images (N, H, W, C) by name, after `step` steps."""
    for own in self._own:
      own.write_images(step, dict(images))
    for writer in self._writers:
      with tolerate(f"images by {type(writer).__name__}"):
        writer.write_images(step, images)

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """Writes bar charts by name, after `step` steps; the further writers get none."""
    for own in self._own:
      own.write_bars(step, dict(bars))

  def go_back(self, step: int) -> None:
    """Makes the writers of the package forget the metrics after `step`."""
    for own in self._own:
      own.go_back(step)

  def close(self) -> None:
    """Writes what is not written yet, and closes the writers of the package."""
    for own in self._own:
      own.close()


@contextlib.contextmanager
def tolerate(what: str) -> Iterator[None]:
  """Logs an exception of the block instead of raising it.

  Args:
    what: name of what the block writes, for the log.
  """
  try:
    yield
  except Exception as error:  # writers raise other exceptions than OSError
    logger.error("NOT WRITTEN: %s: %s", what, one_line(error))
