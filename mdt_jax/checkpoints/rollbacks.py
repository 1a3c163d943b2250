"""The batches with which a run continues from a checkpoint after a rollback.

The state of a checkpoint holds the offset of the batches from before the rollback. A
file beside the state holds the new one, and moves or disappears with its checkpoint.
"""

from __future__ import annotations

from mdt_jax.atomic import read_json, write_json
from mdt_jax.buckets import AnyPath

FILE = "rollback.json"  # inside the folder of a checkpoint, without a checksum


def write_offset(folder: AnyPath, step: int, batch_offset: int) -> None:
  """Writes rollback.json; it replaces that of an earlier rollback.

  Args:
    folder: folder of the checkpoint.
    step: step of the checkpoint.
    batch_offset: see `TrainState`.
  """
  # The sum of the other two numbers reveals a damaged file.
  found = {"step": step, "batch_offset": batch_offset, "batch": step + batch_offset}
  write_json(folder / FILE, found)


def read_offset(folder: AnyPath, step: int) -> int | None:
  """Returns `batch_offset` of the last rollback; None if there was no rollback.

  Args:
    folder, step: see `write_offset`.

  Raises:
    ValueError: the file is damaged.
    DataUnavailable: the bucket does not answer.
  """
  try:
    found = read_json(folder / FILE, ValueError)
  except FileNotFoundError:
    return None
  offset = found.get("batch_offset")
  whole = {"step": step, "batch_offset": offset, "batch": step + (offset or 0)}
  if type(offset) is not int or found != whole:
    raise ValueError(f"{FILE} is damaged")
  return offset
