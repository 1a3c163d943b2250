"""The loss by diffusion time: means over many steps, as numbers and as a bar chart."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from mdt_jax.training.events import Bars, Events
from mdt_jax.training.step import LOSS_BY_TIME, Metrics

NUM_TIME_BINS = 15  # half of the bars that TensorBoard shows
WIDTH, HEIGHT, MARGIN = 480, 240, 42  # pixels of the chart; MARGIN is for the text
COLOUR = (70, 110, 180)
CHART = f"{LOSS_BY_TIME}_chart"  # a name of TensorBoard has one kind of value


class LossByTime:
  """Adds up the losses by time of a run, and writes their means at intervals.

  TensorBoard and Weights & Biases show the means as the picture "loss_by_time_chart"
  and as the histogram "loss_by_time"; metrics.jsonl has the numbers.

  Args:
    events: writers of the run.
    start: number of steps done at the start.
    every: steps between two charts; 0 for no charts.
    num_steps: number of steps of the run.
  """

  def __init__(self, events: Events, *, start: int, every: int, num_steps: int):
    self._events, self._every, self._num_steps = events, every, num_steps
    self.go_back(start)

  def go_back(self, done: int) -> None:
    """Discards the losses that are not written yet; the run is at step `done`."""
    self._first = self._written = done
    self._sums: np.ndarray | None = None

  def add(self, done: int, metrics: Metrics) -> None:
    """Adds the metrics of steps up to `done`, and writes the means if they are due."""
    if not self._every or LOSS_BY_TIME not in metrics:
      return
    found = np.asarray(jax.device_get(metrics[LOSS_BY_TIME]), np.float64)
    self._sums = found if self._sums is None else self._sums + found
    passed = done // self._every > self._written // self._every
    if passed or done == self._num_steps:
      self._write(done, self._sums)
      self.go_back(done)

  def _write(self, done: int, sums: np.ndarray) -> None:
    losses, weights = sums
    with np.errstate(invalid="ignore"):
      means = losses / weights  # NaN for a bin without samples
    edges = np.linspace(0, 1, len(means) + 1)
    title = f"mean loss by diffusion time, steps {self._first + 1:,} to {done:,}"
    self._events.write_bars(done, {LOSS_BY_TIME: Bars(edges, means)})
    chart = np.asarray(draw_chart(means, title))
    self._events.write_images(done, {CHART: chart[None]})


def draw_chart(means: Float[np.ndarray, "bins"], title: str) -> Image.Image:
  """Draws a bar chart of losses by time, from the least noise to the most.

  Args:
    means: mean loss of each bin; NaN for a bin without samples, which has no bar.
    title: text above the bars.
  """
  chart = Image.new("RGB", (WIDTH, HEIGHT), "white")
  drawer, font = ImageDraw.Draw(chart), ImageFont.load_default(size=11)
  left, right, top, bottom = MARGIN, WIDTH - 8, 24, HEIGHT - 22
  finite = means[np.isfinite(means)]
  highest = max(finite.max(initial=0.0), 1e-12)
  low, high = min(finite.min(initial=0.0), 0.0), highest
  drawer.text((left, 5), title, fill="black", font=font)

  def row(value: float) -> float:
    return bottom - (value - low) / (high - low) * (bottom - top)

  for share in (0, 1 / 2, 1):
    value = low + share * (high - low)
    y = row(value)
    drawer.line([(left, y), (right, y)], fill=(220, 220, 220))
    drawer.text((left - 4, y), f"{value:.3g}", "black", font, anchor="rm")
  width = (right - left) / len(means)
  for i, value in enumerate(means.tolist()):
    if np.isfinite(value):
      ys = sorted((row(value), row(0)))
      x = left + i * width
      drawer.rectangle([(x + 1, ys[0]), (x + width - 2, ys[1])], fill=COLOUR)
  y = bottom + 6
  drawer.text((left, y), "0: least noise", "black", font)
  middle = (left + right) / 2
  drawer.text((middle, y), "share of the process", "black", font, anchor="ma")
  drawer.text((right, y), "1: most noise", "black", font, anchor="ra")
  return chart
