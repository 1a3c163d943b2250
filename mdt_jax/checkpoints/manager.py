"""Checkpoints of a run, by Orbax, with the config beside them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax import factories
from mdt_jax.checkpoints import checksums
from mdt_jax.checkpoints.compatibility import check_same_run
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.train_state import Params, TrainState, init_params

FOLDER = "checkpoints"  # inside a workdir
DAMAGED = "damaged"  # beside it: checkpoints that were passed over
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FIRST_PAUSE = 10  # seconds after a save that failed; doubled each time
MAX_REASON = 300  # characters of an error of a library

logger = logging.getLogger("mdt_jax")


class SaveError(Exception):
  """A checkpoint cannot be saved, however often it is tried."""


class Checkpoints:
  """The checkpoints of a workdir: state, averages and config for some steps.

  Saves are asynchronous and atomic: a step is there as a whole or not at all. A
  finished one is sealed with checksums; a damaged one is put aside.

  Args:
    workdir: of the run.
    to_keep: the last so many are kept.
    keep_every: checkpoints of multiples of so many steps are kept besides.
    max_failures: saves in a row that may fail, before `save` raises SaveError.
    cleans: half-written checkpoints are removed; for the run that writes them alone.
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
    self._max_failures = max_failures
    self._failures = 0
    self._sealer = futures.ThreadPoolExecutor(1, "seal")
    self._pending: futures.Future[None] | None = None  # under way, or not looked at yet
    self._saving = 0  # its step
    self._not_saved: int | None = None  # step of the last save, where that failed
    self._try_again = -math.inf  # not before this time of the monotonic clock

  def latest_step(self, until: int | None = None) -> int | None:
    """Of the finished checkpoints, up to step `until`; None where there is none."""
    steps = self._manager.all_steps()
    return max((step for step in steps if until is None or step <= until), default=None)

  def save(
    self, step: int, state: TrainState, config: ConfigDict, *, again: bool = False
  ) -> bool:
    """Begins to save the state after `step` steps, unless that step is there already.

    A disk that is full, or refuses, is said loudly and waited for: training goes on
    without this checkpoint, and `must_try_again` says when to save after all.

    Returns whether a save has begun; after one that failed none does, but `again`.

    Raises:
      SaveError: `max_failures` saves in a row failed.
    """
    if self._end_of_save() or (self._not_saved is not None and not again):
      return False
    if step in self._manager.all_steps() and step != self._not_saved:
      return False
    self._saving = step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state.replace(ema=None)),
          ema=ocp.args.PyTreeSave(state.ema),
          config=ocp.args.JsonSave(config.to_dict()),
          versions=ocp.args.JsonSave(_versions()),
        ),
      )
    except Exception as error:  # Orbax and TensorStore raise many kinds
      self._pending = futures.Future()
      self._pending.set_exception(error)
    else:
      self._pending = self._sealer.submit(self._seal, step)
    return True

  def must_try_again(self) -> bool:
    """Whether a save that failed is to be seen to now, as far as this process knows.

    Where any process finds so, all call `save` with `again`.
    """
    if self._pending is not None:
      return self._pending.done() and self._pending.exception() is not None
    return self._not_saved is not None and time.monotonic() >= self._try_again

  def finish(self, step: int, state: TrainState, config: ConfigDict) -> None:
    """Saves, and waits until the step is there; raises SaveError as `save` does."""
    self._end_of_save()  # of the one before: where that failed, this does not wait
    while True:
      self.save(step, state, config, again=True)
      self._end_of_save()
      if self._not_saved is None:
        return
      time.sleep(max(0.0, self._try_again - time.monotonic()))

  def put_aside_after(self, step: int) -> None:
    """Moves the checkpoints of later steps out of the way, to train them anew."""
    self._end_of_save()
    while (latest := self.latest_step()) is not None and latest > step:
      self._put_aside(latest, f"the run goes back to step {step}")

  def restore(
    self, like: TrainState, config: ConfigDict, until: int | None = None
  ) -> TrainState:
    """The latest state that is not damaged.

    Args:
      like: shapes, types and shardings of the state.
      config: of the run that goes on.
      until: of this step or an earlier one.

    Raises:
      SettingError: the checkpoint is of another network, optimizer or averages, or a
        converted model; or every one is damaged.
    """
    workdir = str(self._folder.parent)
    while (step := self.latest_step(until)) is not None:
      reads = jax.process_index() == 0  # one does, and all are told
      found = checksums.damage(self._folder / str(step)) if reads else None
      if damage := _on_any_process(found or ""):
        self._put_aside(step, damage)
        continue
      saved = self._manager.restore(
        step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
      ).config
      check_same_run(config_from_dict(saved), config, workdir)
      if not (self._folder / str(step) / "state").is_dir():
        raise SettingError(
          "--workdir",
          workdir,
          "holds a converted model, to be sampled; it has no state to train on from",
        )
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=_restore_args(like.replace(ema=None)),
          ema=_restore_args(like.ema),
        ),
      )
      return restored.state.replace(ema=restored.ema)
    raise SettingError(
      "--workdir", workdir, f"every checkpoint is damaged; they are in {DAMAGED!r}"
    )

  def close(self) -> None:
    """Waits for a save under way; one that fails now is not tried again."""
    self._sealer.shutdown()
    # Other processes may be gone: what this one knows has to do.
    if self._pending is not None and (error := self._pending.exception()) is not None:
      logger.error(
        "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s", self._saving, _reason(error)
      )
    with contextlib.suppress(Exception):  # which says the same once more
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

  def _seal(self, step: int) -> None:
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      checksums.seal(self._folder / str(step))

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
    self._failures = 0
    self._not_saved = None
    return False

  def _failed(self, reason: str) -> None:
    self._failures += 1
    self._not_saved = self._saving
    if self._failures >= self._max_failures:
      raise SaveError(
        f"{self._folder}: {self._failures} saves in a row failed, the last of step "
        f"{self._saving}: {reason}"
      )
    pause = FIRST_PAUSE * 2 ** (self._failures - 1)
    self._try_again = time.monotonic() + pause
    logger.error(
      "THE CHECKPOINT OF STEP %d IS NOT SAVED: %s. Training goes on; saves are tried "
      "again after %d s (failure %d of %d)",
      self._saving,
      reason,
      pause,
      self._failures,
      self._max_failures,
    )
    with contextlib.suppress(Exception):  # which says the same once more
      self._manager.close()
    if jax.process_index() == 0:  # where it is whole, but for its seal
      shutil.rmtree(self._folder / str(self._saving), ignore_errors=True)
    self._manager = self._open()  # and away with what is half-written

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
  """The first of what the processes say that is not empty; all call, and get it."""
  if jax.process_count() == 1:
    return text
  padded = np.zeros(MAX_REASON, np.uint8)
  encoded = np.frombuffer(text.encode()[:MAX_REASON], np.uint8)
  padded[: encoded.size] = encoded
  every = multihost_utils.process_allgather(padded)
  said = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in every)
  return next(filter(None, said), "")


def _restore_args(like: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
  """For arrays of these shapes, types and shardings; `partial`: leave out others."""
  return ocp.args.PyTreeRestore(
    like,
    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
    partial_restore=partial,
  )


def _versions() -> dict[str, str]:
  """Of the packages that a checkpoint was made with, to be looked at."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def workdir_of(path: str | Path) -> Path:
  """The workdir that `path`, or the folder "checkpoints" in it, is."""
  folder = Path(path).expanduser().absolute()
  return folder.parent if folder.name == FOLDER else folder


def save_model(
  workdir: str | Path, config: ConfigDict, params: Params, step: int = 0
) -> None:
  """Saves parameters that come from elsewhere, to be sampled as averaged ones.

  Args:
    workdir: folder without checkpoints.
    config: the run that they are of; they are saved as its first average.
    params: parameters of `make_model(config)`.
    step: number of the checkpoint.
  """
  with ocp.CheckpointManager(
    Path(workdir).absolute() / FOLDER, item_names=("ema", "config")
  ) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardSave({str(config.ema_decays[0]): params}),
        config=ocp.args.JsonSave(config.to_dict()),
      ),
    )
  checksums.seal(Path(workdir).absolute() / FOLDER / str(step))


def load_ema(
  path: str | Path, step: int | None = None, ema_decay: float | None = None
) -> tuple[ConfigDict, Params, int]:
  """Config and averaged parameters of a checkpoint, from the folder alone.

  Args:
    path: a workdir, or the folder "checkpoints" in it.
    step: of the checkpoint; None for the latest that is not damaged.
    ema_decay: which average; None for config.sampling.ema_decay, else the first.

  Returns:
    (config, params, step).

  Raises:
    SettingError: there is no checkpoint, or none of that step or decay, or it is
      damaged.
  """
  folder = workdir_of(path) / FOLDER
  if not folder.is_dir():
    raise SettingError(
      "--checkpoint", str(path), f"must be a workdir with a folder {FOLDER!r} in it"
    )
  with ocp.CheckpointManager(
    folder,
    item_names=("state", "ema", "config"),
    options=ocp.CheckpointManagerOptions(create=False),
  ) as manager:
    steps = manager.all_steps()
    if not steps:
      raise SettingError("--checkpoint", str(path), "holds no finished checkpoint")
    step = _whole_step(folder, steps, step)
    saved = manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    ).config
    config = config_from_dict(saved)
    decay = ema_decay if ema_decay is not None else factories.sampled_decay(config)
    check_choice("--ema_decay", decay, config.ema_decays)
    model = factories.make_model(config)
    abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
    )
    ema = manager.restore(
      step,
      args=ocp.args.Composite(ema=_restore_args({str(decay): abstract}, partial=True)),
    ).ema
  return config, ema[str(decay)], step


def _whole_step(folder: Path, steps: Iterable[int], asked: int | None) -> int:
  """The step asked for, or else the latest whose averages are not damaged."""
  if asked is not None:
    check_choice("--step", asked, sorted(steps))
  for step in sorted(steps, reverse=True) if asked is None else [asked]:
    damage = checksums.damage(folder / str(step), items=("ema", "config"))
    if damage is None:
      return step
    logger.warning("the checkpoint of step %d is passed over: %s", step, damage)
  raise SettingError("--checkpoint", str(folder.parent), f"is damaged: {damage}")


def config_from_dict(saved: dict[str, Any]) -> ConfigDict:
  """A config as it was saved; settings that came later have their defaults."""
  config = settings.default_config()
  with config.unlocked():
    config.update(saved)
  config.ema_decays = tuple(saved["ema_decays"])
  config.sampling.cfg_interval = tuple(config.sampling.cfg_interval)
  return config
