"""The training loop: data in, steps, logs, pictures and checkpoints out."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories, sharding
from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.data.loader import create_loader
from mdt_jax.data.sources import Source
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Evaluator, Stopped
from mdt_jax.models.masking import KeptLengths
from mdt_jax.train_state import TrainState
from mdt_jax.training import distributed
from mdt_jax.training.events import Events, tolerate
from mdt_jax.training.hooks import Periodic, Pictures, Scores
from mdt_jax.training.lock import locked
from mdt_jax.training.program import Program, make_program
from mdt_jax.training.progress import Progress
from mdt_jax.training.skipped import SkippedSteps

logger = logging.getLogger("mdt_jax")
STEPS_BETWEEN_AGREEMENTS = 10  # of several processes, on whether to stop


class Interrupted(Exception):
  """The run was asked to stop; its state is saved.

  Attributes:
    signals: that asked for it; none where another process was asked.
  """

  def __init__(self, message: str, signals: list[int]):
    super().__init__(message)
    self.signals = signals


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
  """Trains to config.num_steps, from the last checkpoint in `workdir` if there is one.

  Args:
    config: see `mdt_jax.config.default_config`.
    workdir: folder for checkpoints, TensorBoard events, pictures, scores and
      config.json.

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
      settings.check(config, jax.device_count())
      if os.path.isfile(workdir):  # not Path's, which raises where it may not look
        raise SettingError(
          "--workdir", str(workdir), "must be a folder, this is a file"
        )
      mesh = sharding.make_mesh(**config.mesh)
      autoencoder = factories.make_autoencoder(config, sharding.replicated(mesh))
      source = factories.make_source(config, autoencoder)
      kept_lengths = factories.kept_lengths(config)
      evaluate = None
      if config.eval.every:
        evaluate = Evaluator(config, mesh, source, autoencoder)
      if is_main:
        stack.enter_context(locked(workdir))
    stop = stack.enter_context(stop_signals(config.grace_seconds))
    saved = stack.enter_context(contextlib.closing(_open_checkpoints(config, workdir)))
    stack.enter_context(sharding.use_mesh(mesh))
    program = make_program(config, mesh)
    state = _first_state(config, program, saved)
    start = int(state.step)
    logger.info("%s", _summary(config, mesh, source, state, kept_lengths))
    shown = [
      Pictures(config, mesh, workdir, autoencoder),
      Scores(config, workdir, evaluate),
    ]
    missing = [show for show in shown if show.is_missing(start)]
    if start >= config.num_steps and not missing:
      logger.info("nothing to do: %d of %d steps are done", start, config.num_steps)
      return state
    events = Events(workdir / "tensorboard" if is_main else None)
    stack.callback(events.close)
    # The start before this one ended while they were made.
    if _show(missing, start, state, events, stop):
      raise Interrupted(f"stopped at step {start}, which is saved", stop)
    if start >= config.num_steps:
      return state
    if is_main:
      with tolerate("config.json"):
        settings.write(config, workdir)

    loader, offset = _open_loader(config, mesh, source, state)
    progress = Progress(config, events, start)
    skipped = SkippedSteps(config, workdir, len(source))
    last_save = time.monotonic()
    rollbacks = 0
    done = start
    while done < config.num_steps:
      n, done = done, done + 1
      try:
        batch = next(loader)
      except SettingError:  # too many unreadable files: what is done stays done
        if n > start and jax.process_count() == 1:  # a save needs every process
          saved.finish(n, state, config)
        raise
      num_keep = kept_lengths.draw(config.seed, n) if kept_lengths else None
      batch = sharding.put_batch(batch, mesh, config.batch_size)
      with jax.transfer_guard("disallow"):  # but for what is asked for by name
        if factories.encodes_images(config):
          batch["moments"] = autoencoder.moments(batch.pop("image"))
        state, metrics = program.step(state, batch, num_keep)
        progress.add(done, metrics)
      skipped.add(n, n + offset, metrics)
      if done == config.num_steps:
        skipped.look_at_all()
      if skipped.too_many:
        rollbacks += 1
        if rollbacks > config.max_rollbacks or saved.latest_step(skipped.first) is None:
          skipped.stop(saved.latest_step())
        state = _go_back(config, program, saved, skipped, batch=n + offset)
        done = int(state.step)
        loader, offset = _open_loader(config, mesh, source, state)
        progress.go_back(done)
        continue
      stops, is_late, again = _any_process(
        done, bool(stop), _is_late(config, last_save), saved.must_try_again()
      )
      due = [show for show in shown if show.is_due(done)]
      is_planned = done % config.checkpoint_every == 0
      is_planned |= any(show.is_long for show in due)
      if done == config.num_steps:
        saved.finish(done, state, config)
      elif again or is_late or is_planned:
        began = saved.save(done, state, config, again=again)
        last_save = time.monotonic() if began else last_save
      if due and not stops:
        with progress.paused():
          stops = _show(due, done, state, events, stop)
      if stops:
        saved.finish(done, state, config)
        raise Interrupted(f"stopped after step {done}, which is saved", stop)
  return state


def _open_loader(
  config: ConfigDict, mesh: jax.sharding.Mesh, source: Source, state: TrainState
) -> tuple[Iterator[dict[str, np.ndarray]], int]:
  """The batches from that of the next step on, and the offset of their numbers."""
  offset = int(state.batch_offset)
  loader = create_loader(
    source,
    seed=config.seed,
    batch_size=config.batch_size,
    flip=config.data.flip,
    start_step=int(state.step) + offset,
    rows=sharding.local_rows(mesh, config.batch_size),
    num_workers=config.data.num_workers,
    num_threads=config.data.num_threads,
    prefetch=config.data.num_threads,
  )
  return loader, offset


def _go_back(
  config: ConfigDict,
  program: Program,
  saved: Checkpoints,
  skipped: SkippedSteps,
  batch: int,
) -> TrainState:
  """The last state before steps were skipped, to go on from with later batches.

  Args:
    config: of the run.
    program: of the run.
    saved: its checkpoints; there is one to go back to.
    skipped: the steps; they are forgotten.
    batch: the last one that was taken, and is left out with those since that state.
  """
  saved.put_aside_after(skipped.first)
  state = saved.restore(program.state, config)
  step = int(state.step)
  logger.warning(
    "too many steps are skipped: the run goes back to step %d, and leaves out the "
    "batches %d to %d",
    step,
    step + int(state.batch_offset),
    batch,
  )
  skipped.forget()
  offset = np.int32(batch + 1 - step)
  return state.replace(batch_offset=jax.device_put(offset, state.step.sharding))


def _open_checkpoints(config: ConfigDict, workdir: Path) -> Checkpoints:
  return Checkpoints(
    workdir,
    config.checkpoints_to_keep,
    config.checkpoint_keep_every or None,
    config.save_failures,
    cleans=True,
  )


def _is_late(config: ConfigDict, last_save: float) -> bool:
  """Whether config.checkpoint_minutes have passed since a save."""
  minutes = config.checkpoint_minutes
  return minutes > 0 and time.monotonic() - last_save >= 60 * minutes


def _any_process(done: int, *here: bool) -> tuple[bool, ...]:
  """What holds on any process, the same on all: they stop and save together."""
  if jax.process_count() > 1 and done % STEPS_BETWEEN_AGREEMENTS:
    return (False,) * len(here)  # agreeing waits for the devices
  return _agree(*here)


def _agree(*here: bool) -> tuple[bool, ...]:
  if jax.process_count() == 1:
    return here
  found = multihost_utils.process_allgather(np.array(here))
  return tuple(bool(any_of) for any_of in found.any(axis=0))


def _show(
  due: Sequence[Periodic], done: int, state: TrainState, events: Events, stop: list[int]
) -> bool:
  """Pictures and scores of a step; whether the run was asked to stop meanwhile."""
  try:
    for show in due:
      show(done, state.ema, events, lambda: _agree(bool(stop))[0])
  except Stopped:
    return True
  return False


@contextlib.contextmanager
def stop_signals(grace_seconds: float = math.inf) -> Iterator[list[int]]:
  """Gathers SIGINT and SIGTERM in the list it gives; a second one acts at once.

  Args:
    grace_seconds: from the first one until the process ends, saved or not; the last
      finished checkpoint is there in any case.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # only the main thread may handle signals
    return

  def end() -> None:
    logger.error("not saved within %g s: the process ends", grace_seconds)
    os._exit(distributed.EXIT_TRY_AGAIN)

  def restore() -> None:
    for number, handler in before.items():
      # None: set by other means than Python's, as jax.distributed does.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  timer = threading.Timer(min(grace_seconds, threading.TIMEOUT_MAX), end)
  timer.daemon = True

  def handle(number: int, frame: object) -> None:
    received.append(number)
    timer.start()
    logger.info("stopping after this step; once more to stop without saving")
    restore()

  before = {
    number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    timer.cancel()
    restore()


def _first_state(
  config: ConfigDict, program: Program, saved: Checkpoints
) -> TrainState:
  """The state to start from, saved or fresh."""
  latest = saved.latest_step()
  if latest is None:
    return program.init(jax.random.key(config.seed))
  state = saved.restore(program.state, config)
  logger.info("going on from the checkpoint of step %d", latest)
  return state


def _summary(
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  source: Source,
  state: TrainState,
  kept_lengths: KeptLengths | None,
) -> str:
  table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  masked = "no masked pass"
  if kept_lengths:
    masked = "kept tokens " + ", ".join(map(str, kept_lengths.lengths))
  devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
  if jax.device_count() > 1:
    devices += " as " + " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  data = f"{len(source)} images, {source.num_classes} classes"
  return f"{config.model.name}\n{table}\n{data}; {masked}; {devices}"
