"""The attention kernel of a run: whether its devices and its passes can run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mdt_jax.logs import logger
from mdt_jax.models.attention import device_problem, needed_tokens
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Objective
from mdt_jax.settings import Settings

AUTO = "auto"  # config.model.attention_kernel: FASTEST where it runs, else plain
# On one H100 it was the faster one alone and in whole steps: docs/performance.md. The
# kernel for TPUs was not measured.
FASTEST = "cudnn"


def with_possible_kernel(settings: Settings) -> Settings:
  """Returns settings of a trained network with a kernel that this machine runs.

  A run may have been trained on devices of another kind. Another kernel computes the
  same function, so that plain attention can replace each; the log says so.
  """
  kernel = settings.model.attention_kernel
  if kernel == AUTO or not (problem := device_problem(kernel, jax.devices()[0])):
    return settings
  logger.info("attention by plain products: %s %s", kernel, problem)
  return settings.with_attention_kernel("plain")


def kernel_problem(
  kernel: str, model: Model, objective: Objective, devices: Sequence[Any] | None
) -> str | None:
  """Says why devices cannot run the attention of a training step; None if they can.

  Args:
    kernel: a key of `models.attention.KERNELS`.
    model, objective: network and objective of the run.
    devices: devices of the run; None for all devices.
  """
  if kernel == "plain":
    return None
  devices = jax.devices() if devices is None else devices
  if problem := device_problem(kernel, devices[0]):
    return problem
  has_bias = model.default_objective == "mdt"
  kept = "config.masking.multiple" if has_bias else "config.objective.arguments"
  lengths = {model.num_tokens: "an image has {}: see input_size and patch_size"}
  for static in objective.static_choices:
    for length in static if isinstance(static, tuple) else (static,):
      if isinstance(length, int):
        lengths.setdefault(length, f"a pass has {{}}: see {kept}")
  for length, where in lengths.items():
    if needed := needed_tokens(kernel, length, has_bias, devices[0]):
      return f"{needed}; {where.format(length)}"
  return None
