"""Removes the checkpoints whose saves were killed."""

from __future__ import annotations

from pathlib import Path

import jax

from mdt_jax.buckets import AnyPath, list_objects
from mdt_jax.checkpoints import checksums
from mdt_jax.checkpoints.agreement import on_any_process
from mdt_jax.errors import one_line
from mdt_jax.paths import remove_folder

COMMIT_SUCCESS = "commit_success.txt"  # of Orbax


def remove_incomplete(folder: AnyPath) -> None:
  """Removes incomplete checkpoints, before any process looks for complete ones.

  All processes must call this function together.

  Args:
    folder: folder of the checkpoints.

  Raises:
    Exception: the folder cannot be used, on all processes if on process 0.
  """
  error: Exception | None = None
  if jax.process_index() == 0:
    try:
      # Orbax's own option would fail each save if a folder cannot be removed.
      _remove_half_written(folder)
    except Exception as raised:  # gcsfs raises those of several libraries
      error = raised
  failure = on_any_process("" if error is None else one_line(error))
  if error is not None:
    raise error
  if failure:
    raise OSError(failure)


def _remove_half_written(folder: AnyPath) -> None:
  """Removes the folders of saves that were killed.

  In a bucket, Orbax marks a complete checkpoint by an object. A checkpoint that was
  copied from a disk may lack this object, and gets it if it has its checksums.
  """
  if isinstance(folder, Path):
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
      remove_folder(path)
    return
  names = list_objects(folder)
  for step in sorted({name.partition("/")[0] for name in names if "/" in name}):
    if f"{step}/{COMMIT_SUCCESS}" in names:
      continue
    if f"{step}/{checksums.FILE}" in names:
      (folder / step / COMMIT_SUCCESS).write_text("copied with its checksums")
    else:
      remove_folder(folder / step)
