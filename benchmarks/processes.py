"""Processes and predictions on digits: python -m benchmarks.processes

The protocol, fixed before the first full run (2026-11-27).

Question: what do the process and the prediction change, all else equal?

- Arms: ARMS, all with the network of configs/digits.py, one unmasked pass, a batch of
  64, AdamW with a peak of 2e-3, 600 steps, averages with a decay of 0.995.
- Measures, of 1,000 images of the averaged parameters, the labels in turn, without
  guidance: the Frechet distance between pixels (0 to 16) of drawn and real digits, and
  the share that a support vector classifier, fitted on the real digits, takes for the
  intended digit. Once with 20 steps of DPM-Solver++ in log-SNR, which all processes
  share, and once with the process's own sampler at about 20 calls of the network.
  Seconds of training, with compilation.
- H1: `flow linear, velocity` has a Frechet distance (20 steps of DPM-Solver++) of at
  most 1.1 times that of `gaussian, v`, the pair of configs/digits.py, on average over
  the seeds.
- H2: x0 predictions recognise as many digits as velocity predictions to 1 percentage
  point (JiT's claim, arXiv 2511.13720, concerns patches of more values than the network
  is wide, so here nothing should be lost or won).
Every arm and seed is reported. Seeds 0, 1, 2. Before any score was seen, the number of
steps was lowered from 1,000, because a run took three minutes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.tables import machine, write_table
from mdt_jax import Pipeline
from mdt_jax.configs import digits
from mdt_jax.evaluation.metrics import frechet_distance
from mdt_jax.training import loop

SEEDS = flags.DEFINE_list("seeds", [0, 1, 2], "Seeds.")
STEPS = flags.DEFINE_integer("steps", 600, "Training steps.")
ARM = flags.DEFINE_string("arm", None, "The only arm to run; None for all.")
WRITE = flags.DEFINE_bool("write", True, "Whether to write the table to docs/.")

NUM_IMAGES = 1000
STD = 0.75  # of the digits' pixels in [-1, 1]
# Samplers: name -> settings.
SHARED = {"method": "dpm++", "num_steps": 20, "spacing": "log_snr"}
OWN = {
  "gaussian": {"method": "ddim", "num_steps": 20},
  "flow": {"method": "ode_heun", "num_steps": 10},
  "edm": {"method": "edm", "num_steps": 10},
}


def _gaussian(prediction: str) -> dict[str, Any]:
  names = {"schedule": "cosine", "prediction": prediction, "variance": "fixed_small"}
  return {f"diffusion.{name}": value for name, value in names.items()}


def _continuous(process: str, **arguments: Any) -> dict[str, Any]:
  return {"diffusion.process": process, "diffusion.arguments": arguments}


# Name -> settings of the config.
ARMS = {
  "gaussian, epsilon": _gaussian("epsilon"),
  "gaussian, x0": _gaussian("x0"),
  "gaussian, v": _gaussian("v"),
  "flow linear, velocity": _continuous("flow"),
  "flow linear, epsilon": _continuous("flow", prediction="epsilon"),
  "flow linear, score": _continuous("flow", prediction="score"),
  "flow linear, x0, loss of the velocity": _continuous(
    "flow", prediction="x0", loss_weight="velocity"
  ),
  "flow linear, velocity, logit-normal t": _continuous(
    "flow", time_distribution="logit_normal"
  ),
  "flow gvp, velocity": _continuous("flow", path="gvp"),
  "flow vp, velocity": _continuous("flow", path="vp"),
  "edm": _continuous("edm", sigma_data=STD),
}


def make_config(settings: dict[str, Any], seed: int) -> ConfigDict:
  """The config of digits with one unmasked pass, without pictures and scores."""
  config = digits.get_config()
  config.seed = seed
  config.num_steps = STEPS.value
  config.masking.ratio = config.masking.width = 0.0
  config.sample_every = config.eval.every = 0
  config.log_every = config.checkpoint_every = 10_000
  config.sampling.update(SHARED)
  for name, value in settings.items():
    group, _, leaf = name.partition(".")
    if isinstance(value, dict):
      config[group][leaf].update(value)
    else:
      config[group][leaf] = value
  return config


def run(settings: dict[str, Any], seed: int) -> list[float]:
  """Returns seconds, and Frechet distance and share recognised of both samplers."""
  real, real_labels = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(real, real_labels)
  labels = np.arange(NUM_IMAGES) % 10
  with tempfile.TemporaryDirectory() as workdir:
    start = time.monotonic()
    loop.train(make_config(settings, seed), Path(workdir))
    figures = [time.monotonic() - start]
    pipeline = Pipeline.from_checkpoint(workdir)
  process = settings.get("diffusion.process", "gaussian")
  for sampler in (SHARED, OWN[process]):
    options = {"spacing": None, "cfg_scale": 1.0, **sampler}
    images = pipeline.draw(labels, seed=seed, batch_size=500, **options)
    pixels = images.reshape(NUM_IMAGES, -1) / 255 * 16
    figures.append(frechet_distance(pixels, real))
    figures.append(float(np.mean(classifier.predict(pixels) == labels)))
  jax.clear_caches()
  return figures


def main(argv: list[str]) -> None:
  del argv
  lines = [
    f"{machine()} (`python -m benchmarks.processes`). {STEPS.value} steps; "
    f"{NUM_IMAGES} images without guidance; mean over seeds "
    f"{', '.join(map(str, SEEDS.value))} and, in brackets, each seed.",
    "",
    "| process, prediction | Frechet distance, dpm++ | recognised | Frechet distance, "
    "own sampler | recognised | seconds |",
    "| --- | --- | --- | --- | --- | --- |",
  ]

  def cell(values: np.ndarray, form: str) -> str:
    each = ", ".join(format(value, form) for value in values)
    return f"{format(values.mean(), form)} ({each})"

  for name, settings in ARMS.items():
    if ARM.value not in (None, name):
      continue
    found = np.array([run(settings, int(seed)) for seed in SEEDS.value])
    seconds, *scores = found.T
    forms = (".1f", ".1%") * 2
    cells = [cell(values, form) for values, form in zip(scores, forms, strict=True)]
    lines.append(f"| {name} | {' | '.join(cells)} | {seconds.mean():.0f} |")
    print(lines[-1], flush=True)
  if WRITE.value:
    write_table("processes.md", "digits", lines)


if __name__ == "__main__":
  app.run(main)
