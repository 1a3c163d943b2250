"""Methods that train on part of the tokens, on digits: python -m benchmarks.methods

The protocol, fixed before the first full run (2026-11-27).

Question: what does each method change, all else equal, at equal steps and at equal
FLOPs?

- Arms: ARMS, networks 96 wide with 6 blocks over 16 tokens, each with its own parts.
  One process (flow, velocities, logit-normal times), one optimizer (AdamW, 1e-3 after
  50 steps of warmup, constant), batch 64, averages with a decay of 0.995. The settings
  of a method are its released ones, scaled to 6 blocks.
- Points of a run: after STEPS steps; after so many steps that their FLOPs are those of
  STEPS steps of DiT; and STEPS / 10 unmasked steps after STEPS (for DiT: more steps).
- Measures, of 500 images of the averaged parameters, the labels in turn, 10 steps of
  Heun: the Frechet distance between pixels (0 to 16) of drawn and real digits, and the
  share that a support vector classifier, fitted on the real digits, takes for the
  intended digit. Unguided; with classifier-free guidance of scale 1.5; and with sparse
  guidance of the same scale (the weak pass leaves out 75% of the tokens and has the
  label), for networks that predict the tokens that a pass leaves out. For SPRINT also
  with path-drop guidance.
- H1 (MDT, TREAD and SPRINT claim it): after STEPS steps, mdt, tread and sprint have a
  smaller Frechet distance than dit, unguided, in each seed.
- H2 (MaskDiT and MicroDiT claim it): at the FLOPs of dit, maskdit and microdit have a
  smaller Frechet distance than dit, unguided, in each seed.
- H3 (the sparse-guidance paper claims it): after STEPS steps, tread has a smaller
  Frechet distance with sparse guidance than with classifier-free guidance, in each
  seed.
Every arm and seed is reported. Seeds 0, 1, 2. 16 tokens are few: the papers train on
256.

A run that is stopped goes on where it was: finished points are kept in the file of
--results, which is committed.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from benchmarks.tables import DOCS, machine, write_table
from mdt_jax import Pipeline, build
from mdt_jax.configs import digits
from mdt_jax.evaluation.metrics import frechet_distance
from mdt_jax.training import loop

SEEDS = flags.DEFINE_list("seeds", [0, 1, 2], "Seeds.")
STEPS = flags.DEFINE_integer("steps", 600, "Training steps of every arm.")
ARM = flags.DEFINE_list("arms", None, "Arms to run; None for all.")
FOLDER = flags.DEFINE_string("folder", "runs/methods", "Folder of the runs.")
RESULTS = flags.DEFINE_string(
  "results", str(DOCS / "methods_digits.jsonl"), "File of the finished points."
)
TABLE = flags.DEFINE_bool(
  "table", False, "Write the table of RESULTS to docs/; no run."
)

NUM_IMAGES = 500
SCALE = 1.5
POINTS = ("equal steps", "equal FLOPs", "unmasked end")
CFG = {"cfg_scale": SCALE}
SPARSE = {**CFG, "weak_condition": "same", "weak_ratio": 0.75}
GUIDANCE = {"unguided": {"cfg_scale": 1.0}, "cfg": CFG, "sparse": SPARSE}
PATH_DROP = {"path drop": {**CFG, "weak_ratio": 1.0}}
SPARSE_ARMS = ("mdt", "maskdit", "tread", "sprint")

# Name -> (network, attributes, arguments of the objective).
ARMS: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
  "dit": ("DiT-S/2", {}, {}),
  "mdt": ("MDTv2-S/2", {"decode_depth": 2}, {}),
  "maskdit": (
    "MaskDiT-S/2",
    {"decode_depth": 2, "decoder_hidden_size": 48, "decoder_num_heads": 2},
    {"ratio": 0.5},
  ),
  "microdit": (
    "MicroDiT-S/2",
    {"mixer_depth": 2, "mixer_hidden_size": 72, "mixer_num_heads": 3},
    {"ratio": 0.75},
  ),
  "tread": ("TREAD-S/2", {"route_start": 1, "route_end": 4}, {"ratio": 0.5}),
  "sprint": ("SPRINT-S/2", {"encoder_depth": 1, "decode_depth": 1}, {"ratio": 0.75}),
}


def make_config(arm: str, seed: int) -> ConfigDict:
  """The config of an arm, without pictures and scores."""
  network, attributes, arguments = ARMS[arm]
  config = digits.get_config()
  config.seed = seed
  config.num_steps = 100_000  # `points` ends the run
  config.model.name = network
  config.model.update(attributes)
  if arm not in ("mdt",):
    config.masking.ratio = config.masking.width = 0.0
    config.objective.arguments.update(arguments)
  config.diffusion.process = "flow"
  config.diffusion.arguments.update({"time_distribution": "logit_normal"})
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "constant"
  config.sample_every = config.eval.every = 0
  config.log_every = config.checkpoint_every = 10_000
  config.sampling.update({"method": "ode_heun", "num_steps": 10, "cfg_power": 0.0})
  config.sampling.cfg_channels = 0
  return config


def step_flops(arm: str) -> float:
  """Mean FLOPs of a training step on one image."""
  objective = build(make_config(arm, 0)).objective
  drawn = [objective.choose_static(0, step) for step in range(200)]
  return float(np.mean([objective.flops(static) for static in drawn]))


def score(workdir: Path, seed: int, arm: str) -> dict[str, list[float]]:
  """Returns guidance -> [Frechet distance, share recognised, GFLOPs an image]."""
  real, real_labels = load_digits(return_X_y=True)
  classifier = SVC(gamma=0.001).fit(real, real_labels)
  labels = np.arange(NUM_IMAGES) % 10
  pipeline = Pipeline.from_checkpoint(workdir)
  ways = dict(GUIDANCE, **(PATH_DROP if arm == "sprint" else {}))
  if arm not in SPARSE_ARMS:
    del ways["sparse"]
  found = {}
  for name, settings in ways.items():
    images = pipeline.draw(labels, seed=seed, batch_size=500, **settings)
    pixels = images.reshape(NUM_IMAGES, -1) / 255 * 16
    recognised = float(np.mean(classifier.predict(pixels) == labels))
    gflops = pipeline.job(labels[:1], **settings).flops / 1e9
    found[name] = [frechet_distance(pixels, real), recognised, gflops]
  return found


def run(arm: str, seed: int, results: Path, done: set[tuple[str, int, str]]) -> None:
  """Trains an arm to each of its points, and appends the scores to `results`."""
  steps, folder = STEPS.value, Path(FOLDER.value).absolute() / f"{arm}-{seed}"
  cost = step_flops(arm)
  equal = round(steps * step_flops("dit") / cost)
  config = make_config(arm, seed)

  def train(workdir: Path, num_steps: int, unmasked_from: int | None = None) -> None:
    config.num_steps = num_steps
    config.objective.unmasked_from = unmasked_from
    loop.train(config, workdir)

  def record(point: str, workdir: Path, num_steps: int, start: float) -> None:
    if (arm, seed, point) in done:
      return
    seconds = time.monotonic() - start
    row = {"arm": arm, "seed": seed, "point": point, "steps": num_steps}
    row |= {"mflops_a_step": cost / 1e6, "seconds": seconds}
    with results.open("a") as file:
      file.write(json.dumps({**row, **score(workdir, seed, arm)}) + "\n")
    print(row, flush=True)

  start = time.monotonic()
  if equal < steps:
    train(folder, equal)
    record("equal FLOPs", folder, equal, start)
  train(folder, steps)
  record("equal steps", folder, steps, start)
  copy, more = folder.with_name(f"{folder.name}-unmasked"), steps + steps // 10
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(folder, copy)
  train(copy, more, None if arm == "dit" else steps)
  record("unmasked end", copy, more, start)
  if equal > steps:
    train(folder, equal)
    record("equal FLOPs", folder, equal, start)
  shutil.rmtree(copy)
  shutil.rmtree(folder)
  jax.clear_caches()


def table(rows: list[dict[str, Any]]) -> list[str]:
  """Lines of the table of all points."""

  def cell(values: list[float], form: str) -> str:
    each = ", ".join(format(value, form) for value in values)
    return f"{format(np.mean(values), form)} ({each})"

  lines = [
    f"{machine()} (`python -m benchmarks.methods`). {NUM_IMAGES} images; mean over the "
    "finished seeds of 0, 1, 2 and, in brackets, each of them in this order.",
  ]
  for point in POINTS:
    same = "equal steps" if point == "equal FLOPs" else point
    lines += [
      "",
      f"{point[0].upper()}{point[1:]}:",
      "",
      "| arm | steps | MFLOPs a step | guidance | MFLOPs an image | Frechet distance | "
      "recognised |",
      "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
      # For dit, both points are one.
      at = same if arm == "dit" else point
      chosen = [row for row in rows if (row["arm"], row["point"]) == (arm, at)]
      chosen.sort(key=lambda row: row["seed"])
      for name in [*GUIDANCE, *PATH_DROP]:
        found = [row[name] for row in chosen if name in row]
        if not found:
          continue
        distance, recognised, gflops = zip(*found, strict=True)
        cells = [arm, str(chosen[0]["steps"]), f"{chosen[0]['mflops_a_step']:.1f}"]
        cells += [name, f"{1000 * gflops[0]:.0f}"]
        cells += [cell(list(distance), ".1f"), cell(list(recognised), ".1%")]
        lines.append(f"| {' | '.join(cells)} |")
  return lines


def main(argv: list[str]) -> None:
  del argv
  results = Path(RESULTS.value)
  lines = results.read_text().splitlines() if results.exists() else []
  rows = [json.loads(line) for line in lines]
  if TABLE.value:
    write_table("methods.md", "digits", table(rows))
    return
  done = {(row["arm"], row["seed"], row["point"]) for row in rows}
  for seed in map(int, SEEDS.value):
    for arm in ARM.value or ARMS:
      points = POINTS[::2] if arm == "dit" else POINTS
      if not {(arm, seed, point) for point in points} <= done:
        run(arm, seed, results, done)


if __name__ == "__main__":
  app.run(main)
