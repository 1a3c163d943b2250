"""The training loop: batches in; steps, logs, pictures and checkpoints out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from mdt_jax import sharding
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.config import write_config
from mdt_jax.data.examples import Source
from mdt_jax.data.loader import create_loader
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Stopped, check_eval, make_training_evaluator
from mdt_jax.experiment import Experiment, build
from mdt_jax.logs import logger
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Objective
from mdt_jax.train_state import TrainState
from mdt_jax.training import distributed
from mdt_jax.training.events import Events, Writer, tolerate
from mdt_jax.training.hooks import Hook, Pictures, Scores
from mdt_jax.training.lock import locked
from mdt_jax.training.preemption import Interrupted, stop_signals
from mdt_jax.training.program import Program, make_program
from mdt_jax.training.progress import Progress
from mdt_jax.training.skipped import SkippedSteps
from mdt_jax.types import Batch

STEPS_BETWEEN_AGREEMENTS = 10  # of several processes, on whether to stop


# Called with (steps done, state) after each step.
StepHook = Callable[[int, TrainState], None]


def train(
  config: ConfigDict,
  workdir: str | Path,
  *,
  model: Model | None = None,
  objective: Objective | type[Objective] | None = None,
  optimizer: optax.GradientTransformation | None = None,
  source: Source | None = None,
  writers: Sequence[Writer] = (),
  hooks: Sequence[StepHook] = (),
) -> TrainState:
  """Trains to config.num_steps, from the last checkpoint in `workdir` if there is one.

  Args:
    config: see `mdt_jax.config.default_config`.
    workdir: folder for checkpoints, TensorBoard events, pictures, scores and
      config.json.
    model, objective, optimizer, source: parts of your own, instead of those of the
      config; see `mdt_jax.own_parts.OwnParts`. A resumed run needs the same parts.
    writers: receive the metrics and pictures that TensorBoard receives, on the first
      process; see `events.Writer`.
    hooks: called with (steps done, state) after each step. The next step takes the
      memory of the state's arrays: copy what has to stay. An error ends the run.

  Returns:
    The last state.

  Raises:
    SettingError: before anything is written, for a setting that cannot be used; later,
      where too many steps are skipped (nothing is saved since), or too many files are
      unreadable (one process saves first, several do not).
    SaveError: config.save_failures saves in a row failed.
    Interrupted: on SIGINT or SIGTERM, once the state is saved.
  """
  distributed.check_same_config(config)
  workdir = Path(workdir).expanduser().absolute()
  is_main = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    with distributed.together():
      experiment = build(
        config, model=model, objective=objective, optimizer=optimizer, source=source
      )
      check_eval(experiment.settings)
      _check_is_folder(workdir)
      experiment.open()
      periodic = _make_hooks(experiment, workdir)
      if is_main:
        stack.enter_context(locked(workdir))
    settings = experiment.settings
    stop = stack.enter_context(stop_signals(settings.grace_seconds))
    saved = stack.enter_context(contextlib.closing(_checkpoints(experiment, workdir)))
    stack.enter_context(sharding.use_mesh(experiment.mesh))
    program = make_program(experiment)
    state = _first_state(experiment, program, saved)
    start = int(state.step)
    logger.info("%s", _summary(experiment, state))
    missing = [hook for hook in periodic if hook.is_missing(start)]
    if start >= settings.num_steps and not missing:
      logger.info("nothing to do: %d of %d steps are done", start, settings.num_steps)
      return state
    events = Events(workdir / "tensorboard", writers) if is_main else Events(None)
    stack.callback(events.close)
    trainer = Trainer(
      experiment, workdir, program, saved, periodic, events, stop, step_hooks=hooks
    )
    if trainer.run_hooks(missing, state):
      raise Interrupted(f"stopped at step {start}, which is saved", stop)
    if start >= settings.num_steps:
      return state
    if is_main:
      with tolerate("config.json"):
        write_config(settings, workdir)
    return trainer.run(state)


class Trainer:
  """Takes a state through the steps of a run.

  Args:
    experiment: objects of the run.
    workdir: of the run.
    program: compiled functions of the run.
    saved: checkpoints of the run.
    hooks: what is made of the averages every so many steps.
    events: for TensorBoard.
    stop: filled by signals that ask the run to stop.
    step_hooks: called with (steps done, state) after each step.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: Path,
    program: Program,
    saved: Checkpoints,
    hooks: Sequence[Hook],
    events: Events,
    stop: list[int],
    step_hooks: Sequence[StepHook] = (),
  ):
    self._experiment = experiment
    self._settings = experiment.settings
    self._config = experiment.settings.to_dict()
    self._program = program
    self._saved = saved
    self._hooks = hooks
    self._events = events
    self._stop = stop
    self._step_hooks = step_hooks
    self._skipped = SkippedSteps(
      self._settings, workdir, num_examples=len(experiment.source)
    )
    self._rollbacks = 0

  def run(self, state: TrainState) -> TrainState:
    """All steps from that of `state` to the last one of the run."""
    start = done = int(state.step)
    total = self._settings.num_steps
    self._last_save = time.monotonic()
    self._progress = Progress(
      self._events,
      start=start,
      log_every=self._settings.log_every,
      num_steps=total,
      batch_size=self._settings.batch_size,
    )
    loader, offset = self._open_loader(state)
    while done < total:
      batch = self._next_batch(loader, state, done, is_new=done > start)
      state = self._step(state, batch, done, offset)
      done += 1
      if done == total:
        self._skipped.look_at_all()
      if self._skipped.too_many:
        state = self._roll_back(batch=done - 1 + offset)
        done = int(state.step)
        loader, offset = self._open_loader(state)
        continue
      self._finish_step(state, done)
      for hook in self._step_hooks:
        hook(done, state)
    return state

  def run_hooks(self, hooks: Sequence[Hook], state: TrainState) -> bool:
    """Runs hooks for a state; whether the run was asked to stop meanwhile."""
    try:
      for hook in hooks:
        hook(int(state.step), state.ema, self._events, self._is_stopped)
    except Stopped:
      return True
    return False

  def _open_loader(
    self, state: TrainState
  ) -> tuple[Iterator[dict[str, np.ndarray]], int]:
    """The batches from that of the next step on, and the offset of their numbers."""
    settings, data = self._settings, self._settings.data
    offset = int(state.batch_offset)
    loader = create_loader(
      self._experiment.source,
      seed=settings.seed,
      batch_size=settings.batch_size,
      flip=data.flip,
      start_step=int(state.step) + offset,
      rows=sharding.local_rows(self._program.mesh, settings.batch_size),
      num_workers=data.num_workers,
      num_threads=data.num_threads,
      prefetch=data.num_threads,
    )
    return loader, offset

  def _next_batch(
    self,
    loader: Iterator[dict[str, np.ndarray]],
    state: TrainState,
    done: int,
    is_new: bool,
  ) -> Batch:
    """The next batch on the devices; a state that is new is saved if there is none."""
    try:
      batch = next(loader)
    except SettingError:  # too many unreadable files
      if is_new and jax.process_count() == 1:  # a save needs every process
        self._saved.finish(done, state, self._config)
      raise
    placed = sharding.put_batch(batch, self._program.mesh, self._settings.batch_size)
    with jax.transfer_guard("disallow"):  # but for explicit transfers
      return self._experiment.encode(placed)

  def _step(self, state: TrainState, batch: Batch, n: int, offset: int) -> TrainState:
    """One step, the n-th from 0; its metrics are logged later."""
    static = self._experiment.objective.choose_static(self._settings.seed, n)
    with jax.transfer_guard("disallow"):  # but for explicit transfers
      state, metrics = self._program.step(state, batch, static)
      self._progress.add(n + 1, metrics)
    self._skipped.add(n, n + offset, metrics)
    return state

  def _finish_step(self, state: TrainState, done: int) -> None:
    """Saves, pictures and scores that are due after step `done`, or a stop."""
    stops, is_late, again = self._any_process(
      done, bool(self._stop), self._is_late(), self._saved.must_retry()
    )
    due = [hook for hook in self._hooks if hook.is_due(done)]
    is_planned = done % self._settings.checkpoint_every == 0
    is_planned |= any(hook.is_long for hook in due)
    began = False
    if done == self._settings.num_steps:
      self._saved.finish(done, state, self._config)
    elif again or is_late or is_planned:
      began = self._saved.save(done, state, self._config, again=again)
    if began:
      self._last_save = time.monotonic()
    if due and not stops:
      with self._progress.paused():
        stops = self.run_hooks(due, state)
    if stops:
      self._saved.finish(done, state, self._config)
      raise Interrupted(f"stopped after step {done}, which is saved", self._stop)

  def _roll_back(self, batch: int) -> TrainState:
    """The last state before steps were skipped; later batches than `batch` follow.

    Raises:
      SettingError: the run may not go back, or has no state to go back to.
    """
    self._rollbacks += 1
    first = self._skipped.first
    may_go_back = self._rollbacks <= self._settings.max_rollbacks
    if not may_go_back or self._saved.latest_step(first) is None:
      self._skipped.stop(self._saved.latest_step())
    self._saved.put_aside_after(first)
    state = self._saved.restore(self._program.state, self._experiment)
    step = int(state.step)
    logger.warning(
      "too many steps are skipped: the run goes back to step %d, and leaves out the "
      "batches %d to %d",
      step,
      step + int(state.batch_offset),
      batch,
    )
    self._skipped.forget()
    self._progress.go_back(step)
    offset = np.int32(batch + 1 - step)
    return state.replace(batch_offset=jax.device_put(offset, state.step.sharding))

  def _is_late(self) -> bool:
    """Whether config.checkpoint_minutes have passed since a save."""
    minutes = self._settings.checkpoint_minutes
    return minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes

  def _is_stopped(self) -> bool:
    """Whether any process was asked to stop; all processes call this together."""
    return distributed.any_process(bool(self._stop))[0]

  def _any_process(self, done: int, *here: bool) -> tuple[bool, ...]:
    """What holds on any process, alike on all: they stop and save together."""
    if jax.process_count() > 1 and done % STEPS_BETWEEN_AGREEMENTS:
      return (False,) * len(here)  # asking the others waits for the devices
    return distributed.any_process(*here)


def _check_is_folder(workdir: Path) -> None:
  if os.path.isfile(workdir):  # not Path's, which raises where it may not look
    raise SettingError("--workdir", str(workdir), "must be a folder, this is a file")


def _make_hooks(experiment: Experiment, workdir: Path) -> list[Hook]:
  """Pictures and scores, where the settings ask for them."""
  settings = experiment.settings
  hooks: list[Hook] = []
  if settings.sample_every and settings.num_samples:
    hooks.append(Pictures(experiment, workdir / "samples"))
  if settings.eval.every:
    evaluate = make_training_evaluator(experiment)
    folder = workdir / "scores"
    hooks.append(Scores(settings.eval.every, settings.num_steps, folder, evaluate))
  return hooks


def _checkpoints(experiment: Experiment, workdir: Path) -> Checkpoints:
  settings = experiment.settings
  return Checkpoints(
    workdir,
    settings.checkpoints_to_keep,
    settings.checkpoint_keep_every or None,
    settings.save_failures,
    cleans=True,
  )


def _first_state(
  experiment: Experiment, program: Program, saved: Checkpoints
) -> TrainState:
  """The state to start from, saved or fresh."""
  latest = saved.latest_step()
  if latest is None:
    return program.init(jax.random.key(experiment.settings.seed))
  state = saved.restore(program.state, experiment)
  logger.info("going on from the checkpoint of step %d", latest)
  return state


def _summary(experiment: Experiment, state: TrainState) -> str:
  """What the log says of a run at its start."""
  table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
  if jax.device_count() > 1:
    shape = experiment.mesh.shape.items()
    devices += " as " + " x ".join(f"{axis} {n}" for axis, n in shape)
  source = experiment.source
  data = f"{len(source)} images, {source.num_classes} classes"
  name = experiment.model_name
  return f"{name}\n{table}\n{data}; {experiment.objective.summary}; {devices}"
