"""Trains the components that the tests register for fifty steps on digits."""

from __future__ import annotations

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from mdt_jax.training.loop import train
from tests.training.tiny import tiny_config

NUM_STEPS = 50


def train_losses(workdir, objective=None, **settings):
  """Returns the loss of each of fifty steps. `settings` have dotted names."""
  config = tiny_config(
    **{
      "num_steps": NUM_STEPS,
      "batch_size": 32,
      "log_every": 1,
      "checkpoint_every": NUM_STEPS,
      "optimizer.name": "adamw",
      "optimizer.learning_rate": 2e-3,
      "diffusion.loss_weight": "none",
      "diffusion.variance": "fixed_small",
      **settings,
    }
  )
  train(config, workdir)
  events = EventAccumulator(str(workdir / "tensorboard"), {"tensors": 0})
  events.Reload()
  losses = [
    float(tensor_util.make_ndarray(event.tensor_proto))
    for event in events.Tensors("loss")
  ]
  assert len(losses) == NUM_STEPS and np.isfinite(losses).all()
  return np.array(losses)


def assert_learns(losses, factor=0.9):
  """Asserts that the last ten losses have a lower mean than the first ten."""
  assert losses[-10:].mean() < factor * losses[:10].mean()
