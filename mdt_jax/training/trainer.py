"""The steps of a training run, and what happens between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import numpy as np

from mdt_jax import sharding
from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.lock import Lock
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.checkpoints.retries import SaveError
from mdt_jax.data.loader import create_loader
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Stopped
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.train_state import TrainState
from mdt_jax.training import distributed
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.hooks import Hook
from mdt_jax.training.kills import ReaderKills
from mdt_jax.training.loss_by_time import LossByTime
from mdt_jax.training.preemption import Interrupted
from mdt_jax.training.profiling import Profiler
from mdt_jax.training.program import Program
from mdt_jax.training.progress import Progress
from mdt_jax.training.skipped import SkippedSteps
from mdt_jax.training.speed import COMPILING, SAVING, WAITING, Speed
from mdt_jax.training.step import Metrics
from mdt_jax.types import Batch

# Several processes agree every so many steps on whether to save or to stop.
STEPS_BETWEEN_AGREEMENTS = 10
SECONDS_BETWEEN_LOOKS = 1.0  # at the lock, so that a fast run does not wait for a disk
WORKER_KILLED = "was terminated unexpectedly"  # in Grain's error

# Called with (steps done, state) after each step.
StepHook = Callable[[int, TrainState], None]


class Trainer:
  """Runs the steps of a training run.

  Args:
    experiment: objects of the run.
    workdir: folder of the run.
    program: compiled functions of the run.
    saved: checkpoints of the run.
    hooks: pictures and scores at regular intervals.
    events: writers of metrics and pictures.
    stop: received signals, see `stop_signals`; a signal in the list stops the run.
    profiler: traces steps.
    lock: lock of the workdir; None on processes that do not hold it.
    step_hooks: called with (steps done, state) after each step.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: AnyPath,
    program: Program,
    saved: Checkpoints,
    hooks: Sequence[Hook],
    events: Events,
    stop: list[int],
    profiler: Profiler,
    lock: Lock | None = None,
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
    self._profiler = profiler
    self._speed = Speed(
      experiment.objective,
      experiment.settings.batch_size,
      list(program.mesh.devices.flat),
    )
    self._workdir = workdir
    self._lock = lock
    self._step_hooks = step_hooks
    self._skipped = SkippedSteps(
      self._settings, workdir, num_examples=len(experiment.source)
    )
    self._kills = ReaderKills(workdir)
    self._rollbacks = 0
    self._start = 0  # steps done when `run` began, or of the last rollback
    self._next_look = 0.0  # time.monotonic() of the next look at the workdir
    self._compiled: set[Hashable] = set()  # values of `static`

  def run(self, state: TrainState) -> TrainState:
    """Trains from `state` to the last step of the run.

    Args:
      state: state to start from; its arrays are overwritten.

    Returns:
      The state after the last step, which is saved.

    Raises:
      SettingError, SaveError, Interrupted: see `train`. Any other exception of the
        data, of a step or of a hook is raised after a single process has saved the
        state.
    """
    self._start = start = done = int(state.step)
    total = self._settings.num_steps
    self._last_save = time.monotonic()
    self._progress = Progress(
      self._events,
      start=start,
      log_every=self._settings.log_every,
      num_steps=total,
      batch_size=self._settings.batch_size,
      speed=self._speed,
      loss_by_time=LossByTime(
        self._events,
        start=start,
        every=self._settings.log.loss_by_time_every,
        num_steps=total,
      ),
    )
    loader, offset = self._open_loader(state)
    while done < total:
      with self._saves_on_error(state, done):
        if self._profiler.starts(done):
          with self._progress.paused():
            self._profiler.start(done, state)
        with jax.profiler.StepTraceAnnotation("train_step", step_num=done):
          batch = self._next_batch(loader)
          state = self._step(state, batch, done, offset)
      done += 1
      if self._profiler.stops(done):
        with self._saves_on_error(state, done), self._progress.paused():
          self._profiler.stop(state)
      if done == total:
        self._skipped.look_at_all()
      if self._skipped.too_many:
        state = self._roll_back(batch=done - 1 + offset)
        self._start = done = int(state.step)
        loader, offset = self._open_loader(state)
        continue
      self._finish_step(state, done)
      with self._saves_on_error(state, done):
        for hook in self._step_hooks:
          hook(done, state)
    return state

  def run_hooks(self, hooks: Sequence[Hook], state: TrainState) -> bool:
    """Runs hooks on a state.

    Returns:
      Whether the run was asked to stop before all hooks were done.
    """
    try:
      for hook in hooks:
        hook(int(state.step), state.ema, self._events, self._is_stopped)
    except Stopped:
      return True
    return False

  def _open_loader(
    self, state: TrainState
  ) -> tuple[Iterator[dict[str, np.ndarray]], int]:
    """Returns the batches from the next step on, and (batch number - step number)."""
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

  def _next_batch(self, loader: Iterator[dict[str, np.ndarray]]) -> Batch:
    """Puts the next batch on the devices."""
    with self._speed.timed(WAITING), jax.profiler.TraceAnnotation("wait_for_data"):
      batch = next(loader)
    placed = sharding.put_batch(batch, self._program.mesh, self._settings.batch_size)
    with jax.transfer_guard("disallow"):  # forbids implicit transfers only
      return self._experiment.encode(placed)

  @contextlib.contextmanager
  def _saves_on_error(self, state: TrainState, done: int) -> Iterator[None]:
    """Saves `state`, of `done` steps, if the block raises an exception.

    Several processes save nothing: a save needs all of them, and this may be the only
    one with an exception.

    Raises:
      Interrupted: a reading process was killed, for the first time at this step.
      Exception: any other exception of the block.
    """
    try:
      yield
    except Exception as error:
      # A step overwrites the arrays of the state as soon as it starts.
      is_whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
      owns_workdir = self._lock is not None and not self._lock.is_lost()
      text = f"stopped after step {done}"
      if done > self._start and is_whole and owns_workdir and jax.process_count() == 1:
        try:
          self._saved.finish(done, state, self._config)
          text += "; its checkpoint is saved"
        except SaveError as failed:
          text += f", which is not saved ({failed})"
      if WORKER_KILLED in str(error) and self._kills.is_repeated(done):
        text += "; a reading process was killed again before the run got further"
      elif WORKER_KILLED in str(error):
        raise Interrupted(f"a reading process was killed: {text}", []) from error
      logger.error("%s, because of an error", text)
      raise

  def _step(self, state: TrainState, batch: Batch, n: int, offset: int) -> TrainState:
    """Runs step n, counted from 0, without waiting for the devices."""
    static = self._experiment.objective.choose_static(self._settings.seed, n)
    with jax.transfer_guard("disallow"):  # forbids implicit transfers only
      if static in self._compiled:
        state, metrics = self._program.step(state, batch, static)
      else:
        state, metrics = self._first_step(state, batch, static)
      self._speed.add_step(static)
      self._progress.add(n + 1, metrics)
    self._skipped.add(n, n + offset, metrics)
    return state

  def _first_step(
    self, state: TrainState, batch: Batch, static: Hashable
  ) -> tuple[TrainState, Metrics]:
    """Runs the first step with a value of `static`, which compiles the step."""
    self._compiled.add(static)
    choices = self._experiment.objective.static_choices
    logger.info(
      "compiling the training step, program %d of at most %d …",
      len(self._compiled),
      len(choices),
    )
    start = time.monotonic()
    # Images per second do not count the compilation.
    with self._progress.paused(), self._speed.timed(COMPILING):
      result = self._program.step(state, batch, static)
    logger.info("compiled in %.1f s", time.monotonic() - start)
    return result

  def _finish_step(self, state: TrainState, done: int) -> None:
    """Saves, runs the hooks that are due after `done` steps, and stops if asked to.

    Raises:
      Interrupted: the run was asked to stop, and the state is saved.
    """
    stops, is_late, again, is_lost = self._any_process(
      done,
      bool(self._stop),
      self._is_late(),
      self._saved.must_retry(),
      self._has_lost_workdir(),
    )
    if is_lost:
      raise SettingError(
        "--workdir",
        str(self._workdir),
        f"was deleted, or is used by another run: stopped after step {done}, which is "
        "not saved",
      )
    self._kills.passed(done)
    due = [hook for hook in self._hooks if hook.is_due(done)]
    is_planned = done % self._settings.checkpoint_every == 0
    is_planned |= any(hook.is_long for hook in due)
    began = False
    with self._speed.timed(SAVING):
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
      message = f"stopped after step {done}; its checkpoint is saved"
      raise Interrupted(message, self._stop)

  def _roll_back(self, batch: int) -> TrainState:
    """Returns to the last checkpoint before the first skipped step.

    Args:
      batch: number of the last batch that was used. Training continues with the next
        batch, so the run never sees the batches since the checkpoint again.

    Returns:
      The state of the checkpoint, with the new `batch_offset`.

    Raises:
      SettingError: the run has no such checkpoint, or was rolled back
        config.max_rollbacks times already.
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
      "too many steps are skipped (config.max_skipped = %d): resuming from the "
      "checkpoint at step %d, without batches %d to %d",
      self._settings.max_skipped,
      step,
      step + int(state.batch_offset),
      batch,
    )
    self._skipped.forget()
    self._progress.go_back(step)
    self._events.go_back(step)
    offset = batch + 1 - step
    with tolerate("the rollback"):  # until the next save, a restart repeats the batches
      self._saved.note_rollback(step, offset)
    placed = jax.device_put(np.int32(offset), state.step.sharding)
    return state.replace(batch_offset=placed)

  def _is_late(self) -> bool:
    """Whether config.checkpoint_minutes have passed since the last save."""
    minutes = self._settings.checkpoint_minutes
    return minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes

  def _has_lost_workdir(self) -> bool:
    """Whether the workdir is no longer this run's; looked up once a second."""
    now = time.monotonic()
    if self._lock is None or now < self._next_look:
      return False
    self._next_look = now + SECONDS_BETWEEN_LOOKS
    return self._lock.is_lost()

  def _is_stopped(self) -> bool:
    """Whether any process was asked to stop; all processes call this together."""
    return distributed.any_process(bool(self._stop))[0]

  def _any_process(self, done: int, *here: bool) -> tuple[bool, ...]:
    """For each flag, whether the flag is true on any process.

    All processes get the same answer, so that they save and stop at the same step.
    Asking waits for the devices, so the answer is False between agreements.
    """
    if jax.process_count() > 1 and done % STEPS_BETWEEN_AGREEMENTS:
      return (False,) * len(here)
    return distributed.any_process(*here)
