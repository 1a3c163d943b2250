"""Fine-tuning against training anew, on digits: python -m benchmarks.finetune

The protocol, fixed before the first full run (2026-11-27).

Question: how many steps does a network need to draw three new classes, if it has learnt
seven others? And does it need to train all of its parameters?

- Source: the network of configs/digits.py, trained on digits 0 to 6 for 1,500 steps as
  that config says, once for each seed.
- Arms, on digits 7 to 9, with the same seeds: `fresh` (random weights), `all` (from the
  source, everything trained), `few_shot` and `difffit` (the presets of
  config.optimizer.frozen). Each has a batch of 64, AdamW, a constant learning rate of
  2e-3 after 50 steps of warmup, averages with a decay of 0.995 and config.ema_warmup,
  and 800 steps.
- Measure: at each of POINTS, 300 images of the averaged parameters (20 steps of
  DPM-Solver++, guidance 2, the labels 7, 8, 9 in turn); the share that a support vector
  classifier, fitted on all ten real digits, takes for the intended digit. The score of
  an arm and seed is the first point with a share of at least 0.9.
- H1: `all` needs at most a quarter of the steps of `fresh`, in each of three seeds.
- H2: so do `few_shot` and `difffit`.
Every arm and seed is reported. Seeds 0, 1, 2.

Second round (--round=2), chosen after the first one, in which `all` needed 75, 75 and
100 steps and `fresh` 200, 300 and 300: a part of these steps is the warmup, and the
rows of the new classes start from noise. Both arms again, once without warmup, and once
with ten times the learning rate for the label table. The measure and H1 stay.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.tables import machine, write_table
from mdt_jax import build
from mdt_jax.configs import digits
from mdt_jax.data.digits import DigitsSource
from mdt_jax.data.examples import Example
from mdt_jax.sampling.generator import make_generator
from mdt_jax.train_state import TrainState
from mdt_jax.training import loop

SEEDS = flags.DEFINE_list("seeds", [0, 1, 2], "Seeds.")
SOURCE_STEPS = flags.DEFINE_integer("source_steps", 1500, "Steps on digits 0 to 6.")
POINTS = flags.DEFINE_list(
  "points", [25, 50, 75, 100, 150, 200, 300, 400, 600, 800], "Steps to score at."
)
ROUND = flags.DEFINE_integer("round", 1, "Round of the protocol: 1 or 2.")
ARMS = flags.DEFINE_list("arms", None, "Arms; None for those of the round.")
WRITE = flags.DEFINE_bool("write", True, "Whether to write the table to docs/.")

# Round -> name of an arm -> its settings; INIT is where the trained network is.
INIT = "init.path"
FROM_SOURCE = {INIT: ""}
NO_WARMUP = {"optimizer.warmup_steps": 0}
FAST_LABELS = {"optimizer.learning_rates": "label_embed:2e-2"}
ROUNDS: dict[int, dict[str, dict[str, Any]]] = {
  1: {
    "fresh": {},
    "all": FROM_SOURCE,
    "few_shot": {**FROM_SOURCE, "optimizer.frozen": "few_shot"},
    "difffit": {**FROM_SOURCE, "optimizer.frozen": "difffit"},
  },
  2: {
    "fresh, no warmup": NO_WARMUP,
    "all, no warmup": {**FROM_SOURCE, **NO_WARMUP},
    "fresh, fast labels": FAST_LABELS,
    "all, fast labels": {**FROM_SOURCE, **FAST_LABELS},
  },
}
OLD, NEW = range(7), range(7, 10)
GOAL, NUM_IMAGES, DECAY = 0.9, 300, 0.995


class SomeDigits:
  """The digits of some classes, numbered from 0 on."""

  image_shape = DigitsSource.image_shape

  def __init__(self, classes: range):
    everything = DigitsSource()
    self._examples = [e for e in everything if e["label"] in classes]
    self._first = classes.start
    self.num_classes = len(classes)

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Example:
    example = self._examples[index]
    return {**example, "label": np.int32(example["label"] - self._first)}


def make_config(classes: range, seed: int, **settings: Any) -> ConfigDict:
  """The config of digits for some classes, without pictures and scores."""
  config = digits.get_config()
  config.seed = seed
  config.model.num_classes = len(classes)
  config.sample_every = config.eval.every = 0
  config.log_every = config.checkpoint_every = 10_000
  config.sampling.method = "dpm++"
  config.sampling.num_steps = 20
  config.update_from_flattened_dict(settings)
  return config


def train_source(seed: int, workdir: Path) -> None:
  """Trains the network on the old digits."""
  config = make_config(OLD, seed, num_steps=SOURCE_STEPS.value)
  loop.train(config, workdir, source=SomeDigits(OLD))


def train_arm(
  arm: dict[str, Any], seed: int, source: Path, workdir: Path
) -> list[float]:
  """Trains an arm on the new digits; returns the share recognised at each point."""
  points = [int(point) for point in POINTS.value]
  settings = {
    "num_steps": points[-1],
    "ema_warmup": True,
    "optimizer.schedule": "constant",
    **arm,
  }
  if INIT in arm:
    settings[INIT] = str(source)
  config = make_config(NEW, seed, **settings)
  experiment = build(config)
  images, classes = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(images, classes)
  labels = np.arange(NUM_IMAGES) % len(NEW)
  shares: list[float] = []
  generate = make_generator(experiment.model, experiment.sampler)
  ids = np.arange(NUM_IMAGES, dtype=np.uint32)

  def score(step: int, state: TrainState) -> None:
    if step not in points:
      return
    drawn = generate(state.ema[str(DECAY)], labels, ids, np.uint32(seed))
    pixels = 8 * (1 + np.asarray(drawn).reshape(NUM_IMAGES, -1))
    found = classifier.predict(np.clip(np.round(pixels), 0, 16))
    shares.append(float((found == labels + NEW.start).mean()))

  loop.train(config, workdir, source=SomeDigits(NEW), hooks=[score])
  return shares


def main(argv: list[str]) -> None:
  del argv
  points = [int(point) for point in POINTS.value]
  lines = [
    f"{machine()} (`python -m benchmarks.finetune --round={ROUND.value}`). Share "
    f"recognised of {NUM_IMAGES} images at each step.",
    "",
    f"| arm | seed | {' | '.join(map(str, points))} | first at {GOAL} |",
    f"| --- | --- |{' --- |' * (len(points) + 1)}",
  ]
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    seeds = [int(seed) for seed in SEEDS.value]
    for seed in seeds:
      train_source(seed, folder / f"source{seed}")
    arms = ROUNDS[ROUND.value]
    for arm in ARMS.value or arms:
      for seed in seeds:
        workdir = folder / f"{arm}{seed}"
        shares = train_arm(arms[arm], seed, folder / f"source{seed}", workdir)
        reached = [p for p, share in zip(points, shares, strict=True) if share >= GOAL]
        shown = " | ".join(f"{share:.2f}" for share in shares)
        first = reached[0] if reached else "never"
        lines.append(f"| {arm} | {seed} | {shown} | {first} |")
        print(lines[-1], flush=True)
  if WRITE.value:
    write_table("finetune.md", f"digits, round {ROUND.value}", lines)


if __name__ == "__main__":
  app.run(main)
