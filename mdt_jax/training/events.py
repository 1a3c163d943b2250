"""Metrics and pictures for TensorBoard; a failed write does not stop the run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mdt_jax.logs import logger

if TYPE_CHECKING:
  from clu.metric_writers import MetricWriter

SECONDS_BETWEEN_TRIES = 60.0


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


class Events:
  """Writes scalars and images to TensorBoard, with clu, and to other writers.

  An exception of a writer is logged and not raised. After a failed TensorBoard write,
  `Events` writes nothing to TensorBoard for a minute, and then opens a new event file.

  Args:
    folder: folder of the event files; None writes no event files. Without a TensorFlow
      that can be imported, `Events` logs one line and writes no event files.
    writers: further writers that receive the same scalars and images; `close` does not
      close them.
  """

  def __init__(self, folder: Path | None, writers: Sequence[Writer] = ()):
    self._folder = folder
    self._writers = writers
    self._writer: MetricWriter | None = None
    self._not_before = 0.0  # time.monotonic() of the next try
    if folder is None:
      return
    if (reason := _reason_of_tensorflow()) is None:
      self._writer = _open(folder)
    else:
      self._folder = None
      logger.info("no TensorBoard events are written: %s", reason)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics by name, after `step` steps."""
    with self._tolerantly() as writer:
      if writer is not None:
        writer.write_scalars(step, scalars)
    for own in self._writers:
      with tolerate(f"scalars by {type(own).__name__}"):
        own.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images (N, H, W, C) by name, after `step` steps."""
    with self._tolerantly() as writer:
      if writer is not None:
        writer.write_images(step, images)
    for own in self._writers:
      with tolerate(f"images by {type(own).__name__}"):
        own.write_images(step, images)

  def close(self) -> None:
    """Closes the event file."""
    with self._tolerantly() as writer:
      if writer is not None:
        writer.close()

  @contextlib.contextmanager
  def _tolerantly(self) -> Iterator[MetricWriter | None]:
    """Yields the TensorBoard writer, or None while nothing is to be written."""
    if self._folder is None or time.monotonic() < self._not_before:
      yield None
      return
    with tolerate(f"TensorBoard events in {self._folder}"):
      if self._writer is None:
        self._writer = _open(self._folder)
      try:
        yield self._writer
      except Exception:
        self._writer = None  # a writer that failed once fails forever
        self._not_before = time.monotonic() + SECONDS_BETWEEN_TRIES
        raise


@contextlib.contextmanager
def tolerate(what: str) -> Iterator[None]:
  """Logs an exception of the block instead of raising it.

  Args:
    what: name of what the block writes, for the log.
  """
  try:
    yield
  except Exception as error:  # TensorFlow raises other exceptions than OSError
    logger.error("NOT WRITTEN: %s: %s", what, _short(error))


def _short(error: Exception) -> str:
  """The message of an exception in one line of at most 300 characters."""
  return " ".join(str(error).split())[:300]


def _reason_of_tensorflow() -> str | None:
  """Why TensorFlow, which writes event files, cannot be imported; None if it can."""
  is_own_import = "tensorflow" not in sys.modules
  try:
    import tensorflow as tf  # takes seconds
  except (
    Exception
  ) as error:  # a wrong protobuf raises other exceptions than ImportError
    return _short(error)
  if is_own_import:  # a TensorFlow built for GPUs would take the memory that JAX needs
    with contextlib.suppress(RuntimeError):
      tf.config.set_visible_devices([], "GPU")
  return None


def _open(folder: Path) -> MetricWriter:
  """Opens a new event file with clu's writer."""
  from clu import metric_writers  # imports TensorFlow

  return metric_writers.SummaryWriter(str(folder))
