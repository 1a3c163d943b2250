"""Turns the arguments of a call of `Pipeline` into a `Request`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mdt_jax.errors import SettingError
from mdt_jax.experiment import Experiment
from mdt_jax.sampling.blocks import Request
from mdt_jax.sampling.conditions import Arrays, make_conditions, make_null
from mdt_jax.sampling.labels import Labels


def make_request(
  experiment: Experiment,
  labels: Labels,
  condition: Arrays | None,
  null: Any,
  *,
  seed: int,
  batch_size: int,
) -> Request:
  """Builds the request of a call; see `Pipeline.job` for the arguments.

  Args:
    experiment: objects of the run, with the settings of the call.
    labels, condition, null, seed, batch_size: see `Pipeline.job`.

  Raises:
    SettingError: an argument is invalid.
  """
  conditioning, guidance = experiment.model.conditioning, experiment.sampler.guidance
  known = experiment.model.num_classes, experiment.data_labels
  if guidance.needs_null and conditioning.dropout == 0:
    raise SettingError(
      "cfg_scale",
      guidance.scale,
      "must be 1: the network was trained without drops of its condition",
    )
  chosen = make_conditions(conditioning, labels, condition, *known)
  count = len(chosen.y)
  if null is not None and not guidance.needs_null:
    accepted = "must be left out: no null condition is used with cfg_scale = 1 or "
    accepted += "another weak_condition"
    shown = sorted(null) if isinstance(null, Mapping) else type(null).__name__
    raise SettingError("null", shown, accepted)
  negative = make_null(conditioning, null, count, *known)
  if not 0 <= seed < 2**32:
    raise SettingError("seed", seed, "must lie in [0, 2**32)")
  if batch_size < 1:
    raise SettingError("batch_size", batch_size, "must be at least 1")
  request = Request(chosen.y, seed, min(batch_size, count), null=negative)
  if not conditioning.arrays():
    return request
  return dataclasses.replace(request, classes=chosen.labels, captions=chosen.captions)


def check_needed(**arguments: tuple[Any, str, Any]) -> None:
  """Raises SettingError for an argument without another one that it needs.

  Args:
    **arguments: name of an argument -> (its value, name of the other one, its value).
  """
  for name, (value, needed, given) in arguments.items():
    if value is not None and given is None:
      raise SettingError(name, value, f"is only valid together with {needed}")
