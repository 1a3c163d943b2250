"""TensorBoard events and pictures, which a full disk may lose, but not the run."""

from __future__ import annotations

import contextlib
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
  """Receives what TensorBoard receives; clu's metric writers are such writers."""

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Receives metrics by name, after `step` steps."""

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Receives uint8 images (N, H, W, C) by name."""


class Events:
  """Writes scalars and images for TensorBoard, by clu, and to other writers.

  After a failure, which is logged, nothing is written for a minute; then to a new file.
  A failure of another writer is logged each time.

  Args:
    folder: of the event files; None to write nothing.
    writers: other writers; they are not closed.
  """

  def __init__(self, folder: Path | None, writers: Sequence[Writer] = ()):
    self._folder = folder
    self._writers = writers
    self._writer: MetricWriter | None = None
    self._not_before = 0.0  # of the monotonic clock
    if folder is not None:
      self._writer = _open(folder)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    with self._tolerantly() as writer:
      if writer is not None:
        writer.write_scalars(step, scalars)
    for own in self._writers:
      with tolerate(f"scalars by {type(own).__name__}"):
        own.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images (N, H, W, C) by name."""
    with self._tolerantly() as writer:
      if writer is not None:
        writer.write_images(step, images)
    for own in self._writers:
      with tolerate(f"images by {type(own).__name__}"):
        own.write_images(step, images)

  def close(self) -> None:
    with self._tolerantly() as writer:
      if writer is not None:
        writer.close()

  @contextlib.contextmanager
  def _tolerantly(self) -> Iterator[MetricWriter | None]:
    if self._folder is None or time.monotonic() < self._not_before:
      yield None
      return
    with tolerate(f"events in {self._folder}"):
      if self._writer is None:
        self._writer = _open(self._folder)
      try:
        yield self._writer
      except Exception:
        self._writer = None  # it would fail for ever
        self._not_before = time.monotonic() + SECONDS_BETWEEN_TRIES
        raise


@contextlib.contextmanager
def tolerate(what: str) -> Iterator[None]:
  """Logs what is not written, where writing raises."""
  try:
    yield
  except Exception as error:  # TensorFlow's are not those of a file
    reason = " ".join(str(error).split())[:300]
    logger.error("NOT WRITTEN: %s: %s", what, reason)


def _open(folder: Path) -> MetricWriter:
  from clu import metric_writers  # imports TensorFlow, which takes seconds

  return metric_writers.SummaryWriter(str(folder))
