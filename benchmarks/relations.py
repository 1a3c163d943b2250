"""Are relations between parts learnt faster? python -m benchmarks.relations

docs/evidence.md states question, hypotheses and the measure of success; they were
committed before the first full run. benchmarks/relation_arms.py lists the arms.

For each arm of a condition, the command first chooses a learning rate of a grid with a
seed of its own, then trains once per seed. At a geometric grid of steps it draws images
with the averaged parameters and appends a JSON line to the file of --results, which is
committed. A run that is killed goes on at its last point, and finished runs are kept:
the same command continues. Each of --workers runs has a processor core of its own.

--report writes tables and figures of all finished runs to docs/evidence.md.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import relation_report
from benchmarks.relation_arms import (
  ARMS,
  CONDITIONS,
  Arm,
  Condition,
  build_run,
  step_flops,
)
from benchmarks.tables import DOCS
from mdt_jax.atomic import atomic_write
from mdt_jax.data.relations import RelationsSource
from mdt_jax.errors import check_choice
from mdt_jax.evaluation.relation_scores import relation_score
from mdt_jax.sampling.blocks import generate_batches
from mdt_jax.sampling.generator import make_generator
from mdt_jax.sampling.pictures import to_uint8
from mdt_jax.train_state import TrainState, init_state
from mdt_jax.training.step import Metrics, make_train_step, mean_metrics
from mdt_jax.types import Batch

CONDITION = flags.DEFINE_list("conditions", ["16"], "Conditions to run, in this order.")
ARM = flags.DEFINE_list("arms", None, "Arms to run; None for those of the condition.")
SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of the runs.")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Runs at the same time.")
FOLDER = flags.DEFINE_string("folder", "runs/relations", "Folder of unfinished runs.")
RESULTS = flags.DEFINE_string(
  "results", str(DOCS / "evidence.jsonl"), "File of the finished points."
)
RUN = flags.DEFINE_string("run", None, "CONDITION,ARM,SEED,RATE: one run; internal.")
REPORT = flags.DEFINE_bool("report", False, "Write docs/evidence.md; no run.")

RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 101
TUNING_SHARE = 0.36  # of the steps of a condition
NUM_POINTS = 8  # evaluations of a run, at a ratio of sqrt(2) between steps


def points_of(num_steps: int) -> list[int]:
  """Steps of the evaluations of a run: a geometric grid that ends at num_steps."""
  return [round(num_steps * 2 ** (-i / 2)) for i in reversed(range(NUM_POINTS))]


def tuning_points(condition: Condition) -> list[int]:
  """Steps of the evaluations of a run that tunes the learning rate."""
  last = TUNING_SHARE * condition.num_steps
  return [point for point in points_of(condition.num_steps) if point <= last][-2:]


def histograms(source: RelationsSource, images: np.ndarray) -> dict[str, list[int]]:
  """Returns kind -> number of images in which 0, 1, 2, … relations of the kind hold."""
  relations = source.relations
  glyphs, _ = relations.read(images)
  found = {}
  for kind in relations.kinds:
    holds = relations.holds(kind, glyphs)
    counts = np.bincount(holds.sum(1), minlength=holds.shape[1] + 1)
    found[kind] = counts.tolist()
  return found


class Run:
  """A training run of an arm, evaluated at some steps.

  Attributes:
    experiment: the objects of the run.

  Args:
    condition, arm: what to train.
    seed: seed of the run.
    learning_rate: largest learning rate.
    file: file of the state after the last evaluation.
  """

  def __init__(
    self, condition: Condition, arm: Arm, seed: int, learning_rate: float, file: Path
  ):
    self._condition, self._seed, self._file = condition, seed, file
    self._rate = learning_rate
    # A rate of 1, which `step` multiplies: AdamW is linear in the rate. With seed and
    # rate as arguments, one compiled program serves all runs of an arm.
    self.experiment = experiment = build_run(condition, arm, seed, learning_rate=1.0)
    decays = experiment.settings.ema_decays

    def optimizer(rate: jax.Array) -> optax.GradientTransformation:
      return optax.chain(experiment.optimizer, optax.scale(rate))

    @functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
    def step(
      state: TrainState, batch: Batch, static: Hashable, seed: Any, rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
      train_step = make_train_step(
        experiment.model,
        experiment.objective,
        optimizer(rate),
        seed=seed,
        ema_decays=decays,
        frozen=experiment.frozen,
      )
      return train_step(state, batch, static)

    @jax.jit
    def init(key: jax.Array) -> TrainState:
      sampler = experiment.objective.timestep_sampler
      optimizer_of_one = optimizer(jnp.ones(()))
      return init_state(key, experiment.model, optimizer_of_one, decays, sampler)

    self._step = step
    self._generator = make_generator(experiment.model, experiment.sampler)
    self._state: TrainState = init(jax.random.key(seed))
    if file.exists():
      found: Any = flax.serialization.from_bytes(self._state, file.read_bytes())
      self._state = found

  @property
  def done(self) -> int:
    """Number of training steps done."""
    return int(self._state.step)

  def train(self, last: int) -> dict[str, float]:
    """Trains up to step `last`, and returns the mean losses and seconds a step."""
    experiment, batch_size = self.experiment, self.experiment.settings.batch_size
    losses, seconds, compiled = [], [], set()
    # Processor time, because other programs use the core too; a GPU's host waits.
    is_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    for step in range(self.done, last):
      batch = self._batch(step, batch_size)
      static = experiment.objective.choose_static(self._seed, step)
      start = clock()
      self._state, metrics = self._step(
        self._state, batch, static, np.uint32(self._seed), np.float32(self._rate)
      )
      jax.block_until_ready(self._state)
      if static in compiled:
        seconds.append(clock() - start)
      compiled.add(static)
      losses.append(mean_metrics(metrics)["loss"])
    return {"loss": float(np.mean(losses)), "cpu_seconds": float(np.median(seconds))}

  def _batch(self, step: int, size: int) -> dict[str, np.ndarray]:
    """The images of a step; new ones in each step, or again in each epoch.

    Grain's loader would give them one by one, slower than a GPU trains on them.
    """
    source = self.experiment.source
    assert isinstance(source, RelationsSource)
    if source.is_endless:
      cells = source.relations.draw(self._rng(step), size)
    else:
      places = np.arange(step * size, (step + 1) * size)
      epochs = {epoch: self._rng(int(epoch)) for epoch in places // len(source)}
      orders = {epoch: rng.permutation(len(source)) for epoch, rng in epochs.items()}
      indices = [orders[i // len(source)][i % len(source)] for i in places]
      cells = source.all_cells[indices].reshape(size, *[source.relations.grid] * 2)
    images = source.relations.render(cells).astype(np.float32) / 127.5 - 1
    return {"image": images, "label": np.zeros(size, np.int32)}

  def _rng(self, number: int) -> np.random.Generator:
    key = np.array([self._seed, number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))

  def evaluate(self) -> dict[str, Any]:
    """Draws images with the averaged parameters, and returns their scores."""
    condition, experiment = self._condition, self.experiment
    (params,) = self._state.ema.values()
    labels = np.zeros(condition.num_samples, np.int32)
    drawn = generate_batches(
      self._generator, params, labels, seed=self._seed, batch_size=len(labels)
    )
    images = np.concatenate([to_uint8(x, experiment.model) for x in drawn])
    source = experiment.source
    assert isinstance(source, RelationsSource)
    names = ["valid_cells", "free_entropy"]
    names += [] if source.is_endless else ["nearest_cells"]
    scores = {name: relation_score(name, source, images) for name in names}
    return scores | histograms(source, images)

  def save(self) -> None:
    """Writes the state; the write is atomic."""
    data = flax.serialization.to_bytes(jax.device_get(self._state))
    with atomic_write(self._file) as partial:
      partial.write_bytes(data)


def train_run(name: str, arm: str, seed: int, rate: float, results: Path) -> None:
  """Does the run of the arguments, and appends its points to `results`."""
  condition = CONDITIONS[name]
  keys = ("condition", "arm", "seed", "learning_rate")
  wanted = (name, arm, seed, rate)
  done = {
    row["step"] for row in read(results) if tuple(row[key] for key in keys) == wanted
  }
  folder = Path(FOLDER.value).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  file = folder / f"{name}-{arm}-{seed}-{rate:g}.msgpack"
  tuning = seed == TUNING_SEED
  points = tuning_points(condition) if tuning else points_of(condition.num_steps)
  if set(points) <= done:
    return
  run = Run(condition, ARMS[arm], seed, rate, file)
  row: dict[str, Any] = dict(zip(keys, wanted, strict=True))
  row["device"] = jax.devices()[0].device_kind
  for point in points:
    if point <= run.done:
      continue
    measured = run.train(point)
    flops = step_flops(run.experiment, point, seed)  # the mean up to here
    measured["gflops_a_step"] = flops / 1e9
    rounded = {key: float(f"{value:.5g}") for key, value in measured.items()}
    line = json.dumps({**row, "step": point, **rounded, **run.evaluate()}) + "\n"
    if point not in done:  # a process killed before `save` has written it
      with results.open("a") as opened:
        opened.write(line)  # one write, so that lines of several processes stay whole
    run.save()
  file.unlink(missing_ok=True)


def read(results: Path) -> list[dict[str, Any]]:
  """The finished points."""
  if not results.exists():
    return []
  return [json.loads(line) for line in results.read_text().splitlines()]


def tuned_rate(rows: list[dict[str, Any]], name: str, arm: str) -> float | None:
  """The learning rate of an arm: the smallest loss at the end of its tuning run.

  Returns:
    The rate; None if a tuning run is missing.
  """
  if CONDITIONS[name].learning_rate is not None:
    return CONDITIONS[name].learning_rate
  name = CONDITIONS[name].tuned_on or name
  last = tuning_points(CONDITIONS[name])[-1]
  found = {
    row["learning_rate"]: row["loss"]
    for row in rows
    if (row["condition"], row["arm"], row["seed"], row["step"])
    == (name, arm, TUNING_SEED, last)
  }
  if set(found) != set(RATES):
    return None
  return min(found, key=lambda rate: found[rate])


def is_finished(
  rows: list[dict[str, Any]], name: str, arm: str, seed: int, last: int, rate: float
) -> bool:
  """Whether the last point of a run is among the finished points."""
  keys = ("condition", "arm", "seed", "step", "learning_rate")
  return any(
    [row[key] for key in keys] == [name, arm, seed, last, rate] for row in rows
  )


def run_all(jobs: list[tuple[str, str, int, float]]) -> None:
  """Does runs in processes, one process a core, until none is left."""
  left: queue.Queue[tuple[str, str, int, float]] = queue.Queue()
  for job in jobs:
    left.put(job)
  cores = sorted(os.sched_getaffinity(0))

  def work(core: int) -> None:
    while True:
      try:
        name, arm, seed, rate = left.get_nowait()
      except queue.Empty:
        return
      command = [sys.executable, "-m", "benchmarks.relations"]
      command += [f"--run={name},{arm},{seed},{rate}", f"--folder={FOLDER.value}"]
      command += [f"--results={RESULTS.value}"]
      start = time.monotonic()
      # JAX starts as many threads as the process has cores.
      prefix = ["taskset", "--cpu-list", str(core)]
      done = subprocess.run(prefix + command, capture_output=True, text=True)
      seconds = time.monotonic() - start
      status = "done" if done.returncode == 0 else done.stderr[-2000:]
      print(f"{name} {arm} {seed} {rate:g}: {status} ({seconds:.0f} s)", flush=True)

  threads = [
    threading.Thread(target=work, args=(cores[i % len(cores)],))
    for i in range(WORKERS.value or 1)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def main(argv: list[str]) -> None:
  del argv
  results = Path(RESULTS.value).absolute()
  if RUN.value:
    name, arm, seed, rate = RUN.value.split(",")
    train_run(name, arm, int(seed), float(rate), results)
    return
  if REPORT.value:
    rows = read(results)
    rates = {
      name: {arm: tuned_rate(rows, name, arm) for arm in condition.arms}
      for name, condition in CONDITIONS.items()
    }
    relation_report.report(rows, rates)
    return
  for name in CONDITION.value:
    check_choice("--conditions", name, CONDITIONS)
    condition, arms = CONDITIONS[name], ARM.value or CONDITIONS[name].arms
    runs_in = condition.part_of or name
    for arm in arms:
      check_choice("--arms", arm, ARMS)
    rows = read(results)
    if condition.tuned_on is None and condition.learning_rate is None:
      last = tuning_points(condition)[-1]
      jobs = [(name, arm, TUNING_SEED, rate) for arm in arms for rate in RATES]
      run_all([job for job in jobs if not is_finished(rows, *job[:3], last, job[3])])
      rows = read(results)
    rates = {arm: tuned_rate(rows, name, arm) for arm in arms}
    jobs = [
      (runs_in, arm, int(seed), rate)
      for seed in SEEDS.value
      for arm, rate in rates.items()
      if rate is not None
      and not is_finished(rows, runs_in, arm, int(seed), condition.num_steps, rate)
    ]
    run_all(jobs)
    if missing := [arm for arm, rate in rates.items() if rate is None]:
      sys.exit(f"a tuning run failed, so these arms did not run: {', '.join(missing)}")


if __name__ == "__main__":
  app.run(main)
