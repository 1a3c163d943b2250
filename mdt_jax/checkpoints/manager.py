"""Checkpoints of a run, by Orbax, with the config beside them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mdt_jax.checkpoints import checksums
from mdt_jax.checkpoints.compatibility import check_same_run
from mdt_jax.checkpoints.retries import Retries
from mdt_jax.errors import SettingError
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.settings import Settings
from mdt_jax.train_state import TrainState

FOLDER = "checkpoints"  # inside a workdir
DAMAGED = "damaged"  # beside it: checkpoints that were passed over
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
MAX_REASON = 300  # characters of an error of a library


class Checkpoints:
  """The checkpoints of a workdir: state, averages and config for some steps.

  Saves are asynchronous and atomic: a checkpoint is complete or absent. A finished one
  gets checksums; a damaged one is moved aside.

  Args:
    workdir: of the run.
    to_keep: the last so many are kept.
    keep_every: checkpoints of multiples of so many steps are kept besides.
    max_failures: saves in a row that may fail before `save` raises SaveError.
    cleans: remove half-written checkpoints; for the one run that writes them.
  """

  def __init__(
    self,
    workdir: str | Path,
    to_keep: int,
    keep_every: int | None = None,
    max_failures: int = 5,
    cleans: bool = False,
  ):
    self._folder = Path(workdir).absolute() / FOLDER
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=to_keep, keep_period=keep_every
    )
    self._cleans = cleans
    self._manager = self._open()
    self._retries = Retries(self._folder, max_failures)
    self._finisher = futures.ThreadPoolExecutor(1, "checksums")
    self._pending: futures.Future[None] | None = None  # the save under way
    self._saving = 0  # step of the save under way

  def latest_step(self, until: int | None = None) -> int | None:
    """Of the finished checkpoints, up to step `until`; None where there is none."""
    steps = self._manager.all_steps()
    return max((step for step in steps if until is None or step <= until), default=None)

  def save(
    self,
    step: int,
    state: TrainState,
    config: Mapping[str, Any],
    *,
    again: bool = False,
  ) -> bool:
    """Begins to save the state after `step` steps, unless that step is saved already.

    Training goes on without a checkpoint that cannot be written; `must_retry` says
    when to retry.

    Args:
      step: steps done.
      state: after these steps.
      config: of the run, see `Settings.to_dict`.
      again: retry the save that failed.

    Returns:
      Whether a save has begun. After a save that failed none begins without `again`.

    Raises:
      SaveError: `max_failures` saves in a row failed.
    """
    if self._end_of_save() or (self._retries.step is not None and not again):
      return False
    not_saved = self._retries.step
    if step in self._manager.all_steps() and step != not_saved:
      return False
    self._saving = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state.replace(ema=None)),
          ema=ocp.args.PyTreeSave(state.ema),
          config=ocp.args.JsonSave(dict(config)),
          versions=ocp.args.JsonSave(_versions()),
        ),
      )
    except Exception as error:  # Orbax and TensorStore raise many kinds
      self._pending = futures.Future()
      self._pending.set_exception(error)
    else:
      self._pending = self._finisher.submit(self._write_checksums, step)
    return True

  def must_retry(self) -> bool:
    """Whether to retry the failed save now, as far as this process knows.

    Where any process finds so, all call `save` with `again`.
    """
    if self._pending is not None:
      return self._pending.done() and self._pending.exception() is not None
    return self._retries.is_due

  def finish(self, step: int, state: TrainState, config: Mapping[str, Any]) -> None:
    """Saves, and waits for the end of it; raises SaveError as `save` does."""
    self._end_of_save()  # of the save before: where that failed, this one does not wait
    while True:
      self.save(step, state, config, again=True)
      self._end_of_save()
      if self._retries.step is None:
        return
      self._retries.wait()

  def put_aside_after(self, step: int) -> None:
    """Moves the checkpoints of later steps out of the way, to train them anew."""
    self._end_of_save()
    while (latest := self.latest_step()) is not None and latest > step:
      self._put_aside(latest, f"the run goes back to step {step}")

  def restore(
    self, like: TrainState, experiment: Experiment, until: int | None = None
  ) -> TrainState:
    """The latest state that is not damaged.

    Args:
      like: shapes, types and shardings of the state.
      experiment: the run that continues.
      until: of this step or an earlier one.

    Raises:
      SettingError: the checkpoint is of another network, optimizer or averages, or a
        converted model; or every one is damaged.
    """
    workdir = str(self._folder.parent)
    while (step := self.latest_step(until)) is not None:
      reads = jax.process_index() == 0  # one process reads, and tells the others
      found = checksums.damage(self._folder / str(step)) if reads else None
      if damage := _on_any_process(found or ""):
        self._put_aside(step, damage)
        continue
      saved = restore_config(self._manager, step)
      check_same_run(Settings.from_dict(saved), experiment, workdir)
      if not (self._folder / str(step) / "state").is_dir():
        raise SettingError(
          "--workdir",
          workdir,
          "holds a converted model, to be sampled; it has no state to train on from",
        )
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=restore_args(like.replace(ema=None)),
          ema=restore_args(like.ema),
        ),
      )
      return restored["state"].replace(ema=restored["ema"])
    raise SettingError(
      "--workdir", workdir, f"every checkpoint is damaged; they are in {DAMAGED!r}"
    )

  def close(self) -> None:
    """Waits for a save under way; one that fails now is not retried."""
    self._finisher.shutdown()
    # Other processes may be gone, so this one does not ask them.
    if self._pending is not None and (error := self._pending.exception()) is not None:
      logger.error(
        "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s", self._saving, _reason(error)
      )
    with contextlib.suppress(Exception):  # which raises the same error once more
      self._manager.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._cleans and jax.process_index() == 0:
      # Not by Orbax's own option: a folder that cannot be removed would fail each save.
      for half_written in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(half_written, ignore_errors=True)
    return ocp.CheckpointManager(
      self._folder,
      options=self._options,
      item_names=("state", "ema", "config", "versions"),
      # Of floats that are mostly noise, compression saves a twelfth of the disk for
      # four fifths of the CPU time that a save takes from the run.
      item_handlers={
        name: ocp.PyTreeCheckpointHandler(use_compression=False)
        for name in ("state", "ema")
      },
    )

  def _write_checksums(self, step: int) -> None:
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      checksums.write_checksums(self._folder / str(step))

  def _end_of_save(self) -> bool:
    """Waits for the save under way, if there is one; whether it failed.

    Where it failed on one process it failed on all: they go on alike.
    """
    if self._pending is None:
      return False
    error = self._pending.exception()
    self._pending = None
    reason = _on_any_process("" if error is None else _reason(error))
    if reason:
      self._failed(reason)
      return True
    self._retries.succeeded()
    return False

  def _failed(self, reason: str) -> None:
    self._retries.failed(self._saving, reason)
    with contextlib.suppress(Exception):  # which raises the same error once more
      self._manager.close()
    # The checkpoint may be complete but for its checksums.
    if jax.process_index() == 0:
      shutil.rmtree(self._folder / str(self._saving), ignore_errors=True)
    self._manager = self._open()  # which removes what is half-written

  def _put_aside(self, step: int, damage: str) -> None:
    """Moves a damaged checkpoint out of the way; nothing is deleted."""
    aside = self._folder.with_name(DAMAGED) / f"{step}_{time.time_ns()}"
    logger.warning(
      "the checkpoint of step %d is moved to %s: %s",
      step,
      aside,
      damage,
    )
    if jax.process_index() == 0:
      aside.parent.mkdir(exist_ok=True)
      os.rename(self._folder / str(step), aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"put {step} aside")
    self._manager.reload()


def _reason(error: BaseException) -> str:
  return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def _on_any_process(text: str) -> str:
  """The text of the first process whose text is not empty, on every process.

  All processes must call this.
  """
  if jax.process_count() == 1:
    return text
  padded = np.zeros(MAX_REASON, np.uint8)
  encoded = np.frombuffer(text.encode()[:MAX_REASON], np.uint8)
  padded[: encoded.size] = encoded
  every = multihost_utils.process_allgather(padded)
  said = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in every)
  return next(filter(None, said), "")


def restore_args(like: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
  """For arrays of these shapes, types and shardings; `partial`: leave out others."""
  return ocp.args.PyTreeRestore(
    like,
    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
    partial_restore=partial,
  )


def restore_config(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The config of a checkpoint, as JSON holds it."""
  restored = manager.restore(
    step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
  )
  return restored["config"]


def _versions() -> dict[str, str]:
  """Of the packages that a checkpoint was made with, to be looked at."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}
