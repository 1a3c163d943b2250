"""Log lines and TensorBoard's curves, and how fast a run trains."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import jax
import tqdm
from ml_collections import ConfigDict

from mdt_jax.training import step
from mdt_jax.training.events import Events

logger = logging.getLogger("mdt_jax")


def is_due(done: int, every: int, total: int) -> bool:
  """Whether step `done` of `total` is one of every so many, or the last; 0: none is."""
  return every > 0 and (done % every == 0 or done == total)


class Progress:
  """Gathers metrics, and every config.log_every steps writes them and logs a line."""

  def __init__(self, config: ConfigDict, events: Events, start: int):
    self._config = config
    self._events = events
    self._add = jax.jit(step.add_metrics)
    self._metrics: step.Metrics | None = None
    self._last_step, self._last_time = start, time.monotonic()

  def add(self, done: int, metrics: step.Metrics) -> None:
    """Takes the metrics of step number `done`, counted from 1."""
    if self._metrics is not None:
      metrics = self._add(self._metrics, metrics)
    self._metrics = metrics
    if is_due(done, self._config.log_every, self._config.num_steps):
      self._report(done)

  def go_back(self, done: int) -> None:
    """Forgets what is not written yet, where the run goes back to step `done`."""
    self._metrics = None
    self._last_step, self._last_time = done, time.monotonic()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What is done inside is no training: it is left out of images a second."""
    jax.block_until_ready(self._metrics)  # the steps before are
    start = time.monotonic()
    yield
    self._last_time += time.monotonic() - start

  def _report(self, done: int) -> None:
    means = step.mean_metrics(self._metrics)  # waits for the devices
    now = time.monotonic()
    seconds = (now - self._last_time) / (done - self._last_step)
    means["images_per_second"] = self._config.batch_size / seconds
    self._events.write_scalars(done, means)
    left = tqdm.tqdm.format_interval(seconds * (self._config.num_steps - done))
    shown = ("loss", "masked_loss", "gradient_norm")
    numbers = "  ".join(f"{name} {means[name]:.4f}" for name in shown if name in means)
    logger.info(
      "step %d/%d  %s  %.1f images/s  %s left",
      done,
      self._config.num_steps,
      numbers,
      means["images_per_second"],
      left,
    )
    self._metrics = None
    self._last_step, self._last_time = done, now
