"""Saves and restores the checkpoints of a run, with Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mdt_jax.buckets import check_readable, move_folder
from mdt_jax.checkpoints import checksums, rollbacks
from mdt_jax.checkpoints.agreement import on_any_process
from mdt_jax.checkpoints.compatibility import changed_settings, check_same_run
from mdt_jax.checkpoints.incomplete import remove_incomplete
from mdt_jax.checkpoints.restoring import restore_args, restore_config
from mdt_jax.checkpoints.retries import Retries
from mdt_jax.errors import SettingError, one_line
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.paths import absolute, remove_folder
from mdt_jax.settings import Settings
from mdt_jax.train_state import TrainState

FOLDER = "checkpoints"  # folder inside a workdir
DAMAGED = "damaged"  # folder inside a workdir, for checkpoints moved out of FOLDER
# Packages whose versions a checkpoint records.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PATIENCE = 60.0  # seconds that training waits for a save, all in all


class NothingSavedError(SettingError):
  """A run has one checkpoint, whose save was not finished."""


class Checkpoints:
  """The checkpoints of a workdir.

  A checkpoint holds the state, the parameter averages, the config and the versions of
  packages. Saves are asynchronous and atomic. A complete checkpoint gets checksums.
  `restore` moves damaged checkpoints to WORKDIR/damaged. All processes of a run must
  call `save`, `finish`, `put_aside_after` and `restore` together.

  Args:
    workdir: folder of the run.
    to_keep: number of latest checkpoints to keep.
    keep_every: also keep all checkpoints whose step is a multiple of this number.
    max_failures: number of failed saves in a row at which a save raises SaveError.
    cleans: whether to remove incomplete checkpoints; only the run that writes the
      checkpoints may do that.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    to_keep: int,
    keep_every: int | None = None,
    max_failures: int = 5,
    cleans: bool = False,
  ):
    self._folder = absolute(workdir) / FOLDER
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=to_keep, keep_period=keep_every
    )
    self._cleans = cleans
    # None after a failed save, until `_opened` opens a new one.
    self._manager: ocp.CheckpointManager | None = self._open()
    self._retries = Retries(self._folder, max_failures)
    self._finisher = futures.ThreadPoolExecutor(1, "checksums")
    self._pending: futures.Future[None] | None = None  # the running save
    self._saving = 0  # step of the running save
    self._patience = PATIENCE  # seconds to wait for the running save

  def latest_step(self, until: int | None = None) -> int | None:
    """The latest step with a complete checkpoint, at most `until`; None without one."""
    steps = self._opened().all_steps()
    return max((step for step in steps if until is None or step <= until), default=None)

  def save(
    self,
    step: int,
    state: TrainState,
    config: Mapping[str, Any],
    *,
    again: bool = False,
  ) -> bool:
    """Starts an asynchronous save, after waiting for the previous save.

    Waits for `PATIENCE` seconds at most, and then no more for the same save: if a
    bucket or a disk does not answer, training continues without this save. A failed
    save is logged and not raised, so training continues; `must_retry` says when to call
    `save` with `again`.

    Args:
      step: number of training steps done.
      state: state after these steps.
      config: config of the run, from `Settings.to_dict`.
      again: whether to save although the previous save failed.

    Returns:
      Whether a save was started. No save is started if this step is saved already, if
      the save that this call waits for failed or is not over, or if an earlier save
      failed and `again` is False.

    Raises:
      SaveError: `max_failures` saves in a row failed.
    """
    if not self._is_over(step):
      return False
    if self._end_of_save() or (self._retries.step is not None and not again):
      return False
    not_saved = self._retries.step
    self._saving, self._patience = step, PATIENCE
    try:
      manager = self._opened()  # fails as long as the disk is away
      if step in manager.all_steps() and step != not_saved:
        return False
      manager.save(
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
      self._pending = self._finisher.submit(self._write_checksums, manager, step)
    return True

  def settings(self, step: int) -> Settings:
    """Returns the settings that the checkpoint at a step holds."""
    return Settings.from_dict(restore_config(self._opened(), step))

  def must_retry(self) -> bool:
    """Whether to retry the failed save now.

    Processes may give different answers. If the answer is True on any process, all
    processes must call `save` with `again`.
    """
    if self._pending is not None:
      return self._pending.done() and self._pending.exception() is not None
    return self._retries.is_due

  def finish(self, step: int, state: TrainState, config: Mapping[str, Any]) -> None:
    """Saves, waits until the save is complete, and retries a failed save.

    Args:
      step, state, config: see `save`.

    Raises:
      SaveError: `max_failures` saves in a row failed.
    """
    self._end_of_save()  # else `save` returns at once if the running save failed
    while True:
      self.save(step, state, config, again=True)
      self._end_of_save()
      if self._retries.step is None:
        return
      self._retries.wait()

  def put_aside_after(self, step: int) -> None:
    """Moves the checkpoints after `step` to WORKDIR/damaged, although they are intact.

    For a rollback: the next `restore` then returns the state of `step` or before, and
    later saves find no checkpoint of their step. Waits for the running save.

    Args:
      step: the checkpoint of this step, if there is one, stays.
    """
    self._end_of_save()
    while (latest := self.latest_step()) is not None and latest > step:
      self._put_aside(latest, f"the run goes back to step {step} or before")

  def note_rollback(self, step: int, batch_offset: int) -> None:
    """Notes that the run continues from the checkpoint at `step` with other batches.

    Each later `restore` of this checkpoint returns the state with this `batch_offset`.

    Raises:
      OSError or an exception of gcsfs: the note cannot be written.
    """
    if jax.process_index() == 0:
      rollbacks.write_offset(self._folder / str(step), step, batch_offset)

  def restore(
    self, like: TrainState, experiment: Experiment, until: int | None = None
  ) -> TrainState:
    """Restores the latest undamaged state, and moves damaged checkpoints away.

    Args:
      like: a state of jax.ShapeDtypeStruct: shape, dtype and sharding of each array.
      experiment: the run that resumes.
      until: latest step to consider; None for all steps.

    Returns:
      The state of the checkpoint, with the `batch_offset` of the last `note_rollback`
      of its step. An average that the checkpoint lacks starts as a copy of the
      parameters.

    Raises:
      SettingError: the checkpoint belongs to a run with another network or optimizer,
        or with averages that the experiment lacks; the checkpoint is a converted model
        without a training state; or all checkpoints are damaged.
      NothingSavedError: the run was killed during its first save.
    """
    workdir = str(self._folder.parent)
    is_first_save = len(self._opened().all_steps()) == 1
    while (step := self.latest_step(until)) is not None:
      reads = jax.process_index() == 0  # process 0 reads and sends the result
      found, noted = self._look_at(step) if reads else ("", "")
      if damage := on_any_process(found):
        self._put_aside(step, damage)
        if is_first_save and damage == checksums.UNFINISHED:
          raise NothingSavedError("--workdir", workdir, "holds no finished checkpoint")
        continue
      if not (self._folder / str(step) / "state").is_dir():
        raise SettingError(
          "--workdir",
          workdir,
          "holds a converted model without a training state: train in another folder, "
          f"with --config.init.path={workdir}",
        )
      saved = restore_config(self._opened(), step)
      before = Settings.from_dict(saved)
      check_same_run(before, experiment, workdir)
      self._check_optimizer(step, like, experiment)
      held = {str(decay): like.ema[str(decay)] for decay in before.ema_decays}
      restored = self._opened().restore(
        step,
        args=ocp.args.Composite(
          state=restore_args(like.replace(ema=None)), ema=restore_args(held)
        ),
      )
      # `init` is not read again, and the run keeps that of its first start.
      current = dataclasses.replace(experiment.settings, init=before.init)
      if changes := changed_settings(before, current):
        logger.info("other settings than at step %d: %s", step, "; ".join(changes))
      state, ema = restored["state"], restored["ema"]
      if noted := on_any_process(noted):
        offset: Any = np.array(int(noted), np.int32)
        if isinstance(state.batch_offset, jax.Array):  # `like` may name no sharding
          offset = jax.device_put(offset, state.batch_offset.sharding)
        state = state.replace(batch_offset=offset)
      for decay in sorted(like.ema.keys() - held.keys()):  # alike on every process
        logger.info("the average with decay %s starts at step %d", decay, step)
        ema[decay] = jax.tree.map(jnp.copy, state.params)
      return state.replace(ema=ema)
    raise SettingError(
      "--workdir", workdir, f"every checkpoint is damaged, see the folder {DAMAGED!r}"
    )

  def _look_at(self, step: int) -> tuple[str, str]:
    """Returns the damage of a checkpoint, and the `batch_offset` of its rollback.

    Each is an empty text if there is none.
    """
    folder = self._folder / str(step)
    if damage := checksums.damage(folder):
      return damage, ""
    try:
      offset = rollbacks.read_offset(folder, step)
    except ValueError as error:
      return str(error), ""
    return "", "" if offset is None else str(offset)

  def _check_optimizer(
    self, step: int, like: TrainState, experiment: Experiment
  ) -> None:
    """Raises SettingError if the optimizer of the checkpoint had another state."""
    saved: Any = ocp.PyTreeCheckpointHandler().metadata(
      epath.Path(self._folder / str(step) / "state")
    )
    shapes = (
      sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(tree))
      for tree in (saved.tree["opt_state"], like.opt_state)
    )
    if len({tuple(found) for found in shapes}) > 1:
      raise SettingError(
        "optimizer",
        experiment.settings.optimizer.name,
        f"must be the optimizer of the run: its state differs from that of step {step}",
      )

  def close(self) -> None:
    """Waits for the running save; a failed save is logged and not retried."""
    self._finisher.shutdown()
    # Other processes may have ended, so this process does not communicate with them.
    if self._pending is not None and (error := self._pending.exception()) is not None:
      logger.error(
        "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s", self._saving, one_line(error)
      )
    self._close_manager()

  def _close_manager(self) -> None:
    """Closes Orbax's manager if one is open."""
    manager, self._manager = self._manager, None
    with contextlib.suppress(Exception):  # close() raises the error of the save again
      if manager is not None:
        manager.close()

  def _opened(self) -> ocp.CheckpointManager:
    """Returns Orbax's manager, and opens a new one after a failed save.

    All processes must call this function together.

    Raises:
      OSError: the folder cannot be used, on all processes if on one.
    """
    if self._manager is None:
      failure = ""
      try:
        self._folder.mkdir(exist_ok=True)
        if isinstance(self._folder, Path):
          list(self._folder.iterdir())
        else:
          check_readable("--workdir", self._folder)
      except Exception as error:  # gcsfs raises those of several libraries
        failure = one_line(error)
      # If one process alone failed, the others would wait inside Orbax for it.
      if failure := on_any_process(failure):
        raise OSError(failure)
      self._remove_failed()
      self._manager = self._open()
    return self._manager

  def _remove_failed(self) -> None:
    """Removes what the failed save has written, as far as the disk answers."""
    # Only the checksums may be missing: Orbax then considers the checkpoint complete.
    if jax.process_index() == 0 and self._retries.step is not None:
      remove_folder(self._folder / str(self._retries.step))

  def _open(self) -> ocp.CheckpointManager:
    """Opens Orbax's manager, and removes incomplete checkpoints if `cleans` is set."""
    if self._cleans:
      remove_incomplete(self._folder)
    return ocp.CheckpointManager(
      self._folder,
      options=self._options,
      item_names=("state", "ema", "config", "versions"),
      # Compression would save 1/12 of the disk space, because parameters are mostly
      # noise, and is 4/5 of the CPU time of a save.
      item_handlers={
        name: ocp.PyTreeCheckpointHandler(use_compression=False)
        for name in ("state", "ema")
      },
    )

  def _write_checksums(self, manager: ocp.CheckpointManager, step: int) -> None:
    """Waits until Orbax has written a checkpoint, then writes the checksums."""
    manager.wait_until_finished()
    if jax.process_index() == 0:
      checksums.write_checksums(self._folder / str(step))

  def _is_over(self, step: int) -> bool:
    """Whether the running save ends within the patience, on all processes.

    The log names the first step that is not saved for this reason.

    Args:
      step: the step that is to be saved next.
    """
    if self._pending is None:
      return True
    futures.wait([self._pending], self._patience)
    if not on_any_process("" if self._pending.done() else "busy"):
      return True
    if self._patience > 0:
      logger.warning(
        "THE CHECKPOINT OF STEP %d IS NOT SAVED: the save of step %d takes more than "
        "%g s. Training continues without saves until it is over",
        step,
        self._saving,
        PATIENCE,
      )
    self._patience = 0.0
    return False

  def _end_of_save(self) -> bool:
    """Waits for the running save and returns whether the save failed.

    A save that failed on one process counts as failed on all processes.
    """
    if self._pending is None:
      return False
    error = self._pending.exception()
    self._pending = None
    reason = on_any_process("" if error is None else one_line(error))
    if reason:
      self._failed(reason)
      return True
    self._retries.succeeded()
    return False

  def _failed(self, reason: str) -> None:
    """Removes what the failed save has written, and closes Orbax's manager.

    `_opened` opens a new one, because the disk may still be away.
    """
    self._retries.failed(self._saving, reason)
    self._close_manager()
    self._remove_failed()

  def _put_aside(self, step: int, damage: str) -> None:
    """Moves a checkpoint to WORKDIR/damaged, and logs the reason."""
    aside = self._folder.with_name(DAMAGED) / f"{step}_{time.time_ns()}"
    logger.warning(
      "the checkpoint at step %d is moved to %s: %s",
      step,
      aside,
      damage,
    )
    if jax.process_index() == 0:
      checkpoint = self._folder / str(step)
      if isinstance(checkpoint, Path):
        aside.parent.mkdir(exist_ok=True)
        checkpoint.rename(aside)
      else:
        move_folder(checkpoint, epath.Path(aside))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"put {step} aside")
    self._opened().reload()


def _versions() -> dict[str, str]:
  """Installed versions of PACKAGES, saved for information only."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}
