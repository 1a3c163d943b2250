"""Progress: logged metrics, and images per second."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from mdt_jax.training import progress as progress_module
from mdt_jax.training.progress import Progress


def test_images_per_second_excludes_pauses(monkeypatch):
  now = 1000.0
  monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
  written = {}

  class Events:
    def write_scalars(self, done, scalars):
      written[done] = scalars["images_per_second"]

  metrics = {"loss": jnp.ones(2)}
  progress = Progress(Events(), start=0, log_every=2, num_steps=8, batch_size=8)
  progress.add(1, metrics)
  with progress.paused():  # Between two log lines.
    now += 100
  now += 4
  progress.add(2, metrics)
  with progress.paused():  # Right after a log line.
    now += 1000
  progress.add(3, metrics)
  now += 8
  progress.add(4, metrics)
  assert written == {2: pytest.approx(8 * 2 / 4), 4: pytest.approx(8 * 2 / 8)}
