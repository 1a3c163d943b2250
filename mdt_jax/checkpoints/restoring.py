"""Reads parts of a checkpoint with Orbax."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp


def restore_args(like: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
  """Orbax arguments to restore arrays with the shapes, dtypes and shardings of `like`.

  With `partial`, arrays of the checkpoint that are not in `like` are not read.
  """
  return ocp.args.PyTreeRestore(
    like,
    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
    partial_restore=partial,
  )


def restore_config(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The config that a checkpoint holds, as `Settings.from_dict` reads it."""
  restored = manager.restore(
    step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
  )
  return restored["config"]
