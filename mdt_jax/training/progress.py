"""Metrics of training: averages, log lines, TensorBoard curves, images per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
import tqdm

from mdt_jax.logs import logger
from mdt_jax.training import step
from mdt_jax.training.events import Events
from mdt_jax.training.loss_by_time import LossByTime
from mdt_jax.training.speed import Speed, describe


def is_due(done: int, every: int, total: int) -> bool:
  """Whether `done` is a multiple of `every` or equals `total`; False if every is 0."""
  return every > 0 and (done % every == 0 or done == total)


class Progress:
  """Averages metrics over `log_every` steps, then writes and logs the averages.

  Args:
    events: writers of metrics.
    start: number of steps done at the start.
    log_every: steps between two log lines.
    num_steps: number of steps of the run.
    batch_size: images per step.
    speed: adds its scalars to the metrics; None for none.
    loss_by_time: receives the metrics of each report too; None for no charts.
  """

  def __init__(
    self,
    events: Events,
    *,
    start: int,
    log_every: int,
    num_steps: int,
    batch_size: int,
    speed: Speed | None = None,
    loss_by_time: LossByTime | None = None,
  ):
    self._events = events
    self._log_every, self._num_steps = log_every, num_steps
    self._batch_size, self._speed = batch_size, speed
    self._loss_by_time = loss_by_time
    self._add = jax.jit(step.add_metrics)
    self._metrics: step.Metrics | None = None
    self._last_step, self._last_time = start, time.monotonic()

  def add(self, done: int, metrics: step.Metrics) -> None:
    """Adds the metrics of the step that completes `done` steps."""
    if self._metrics is not None:
      metrics = self._add(self._metrics, metrics)
    self._metrics = metrics
    if is_due(done, self._log_every, self._num_steps):
      self._report(done, metrics)

  def go_back(self, done: int) -> None:
    """Discards the metrics that are not written yet; the run returns to step `done`."""
    self._metrics = None
    self._last_step, self._last_time = done, time.monotonic()
    if self._speed is not None:
      self._speed.reset()
    if self._loss_by_time is not None:
      self._loss_by_time.go_back(done)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time of the block from images per second."""
    # Steps that the devices still compute count as training time.
    jax.block_until_ready(self._metrics)
    start = time.monotonic()
    yield
    self._last_time += time.monotonic() - start

  def _report(self, done: int, metrics: step.Metrics) -> None:
    """Writes and logs the averages since the last report."""
    means = step.mean_metrics(metrics)  # waits for the devices
    now = time.monotonic()
    seconds = (now - self._last_time) / (done - self._last_step)
    means["images_per_second"] = self._batch_size / seconds
    details = ""
    if self._speed is not None:
      found = self._speed.report(now - self._last_time)
      means |= found
      details = f"  {describe(found)}"
    self._events.write_scalars(done, means)
    left = tqdm.tqdm.format_interval(seconds * (self._num_steps - done))
    shown = ("loss", "masked_loss", "gradient_norm")
    numbers = "  ".join(f"{name} {means[name]:.4f}" for name in shown if name in means)
    logger.info(
      "step %d/%d  %s  %.1f images/s%s  %s left",
      done,
      self._num_steps,
      numbers,
      means["images_per_second"],
      details,
      left,
    )
    if self._loss_by_time is not None:
      self._loss_by_time.add(done, metrics)
    self._metrics = None
    self._last_step, self._last_time = done, now
