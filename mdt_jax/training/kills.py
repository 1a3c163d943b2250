"""Remembers across starts of a run at which step a reading process was killed."""

from __future__ import annotations

import contextlib

import jax

from mdt_jax.atomic import read_json, write_json
from mdt_jax.buckets import AnyPath

PREFIX = ".reader_killed_"  # of a file in the workdir, for each process of the run


class ReaderKills:
  """The last kill of a reading process that the run has not got past.

  A run that is restarted after each kill would otherwise never end if the same example
  kills its reader each time.

  Args:
    workdir: folder of the run.
  """

  def __init__(self, workdir: AnyPath):
    self._path = workdir / f"{PREFIX}{jax.process_index()}.json"
    self._step = self._read()

  def is_repeated(self, done: int) -> bool:
    """Notes a kill, and returns whether the start before ended here in the same way.

    Args:
      done: number of steps done.
    """
    if self._step is not None and done <= self._step:
      self._forget()  # a person who repeats the command gets the first answer again
      return True
    with contextlib.suppress(Exception):  # the workdir may be gone, or its server
      if self._path.parent.is_dir():
        write_json(self._path, {"step": done})
    return False

  def passed(self, done: int) -> None:
    """Forgets the kill if the run is past its step, after `done` steps."""
    if self._step is not None and done > self._step:
      self._forget()

  def _forget(self) -> None:
    self._step = None
    with contextlib.suppress(Exception):
      self._path.unlink(missing_ok=True)

  def _read(self) -> int | None:
    """The step of the kill; None without a kill or if the file is damaged."""
    try:
      step = read_json(self._path, ValueError).get("step")
    except (OSError, ValueError):
      return None
    return step if type(step) is int else None
