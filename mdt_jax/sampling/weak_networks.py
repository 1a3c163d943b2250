"""A network of its own for the weak pass of guidance, such as an earlier checkpoint."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from mdt_jax.checkpoints.hub_folders import load_run
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.experiment import Experiment
from mdt_jax.models.registry import Model
from mdt_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class WeakNetwork:
  """A network for the weak pass of guidance.

  Attributes:
    model: the network.
    params: its averaged parameters.
    step: training step of the parameters.
  """

  model: Model
  params: Params
  step: int


def load_weak(
  path: str | os.PathLike[str],
  step: int | None,
  experiment: Experiment,
  *,
  own_step: int,
  own_params: Params,
) -> WeakNetwork:
  """Loads the network of the weak pass.

  Args:
    path, step: see `checkpoints.hub_folders.load_run`; the average is the one that the
      run samples.
    experiment: objects of the run whose network is guided, with the settings of the
      call.
    own_step, own_params: training step and parameters of the network that is guided.

  Raises:
    SettingError: setting "weak_checkpoint": there is no weak pass; the checkpoint
      cannot be loaded; its network has another input, condition or process; or both
      passes would be the same.
  """
  guidance = experiment.sampler.guidance
  if guidance.scale == 1:
    accepted = "must be None: a cfg_scale of 1 has no weak pass"
    raise SettingError("weak_checkpoint", str(path), accepted)
  with renamed_in_errors({"path": "weak_checkpoint", "step": "weak_step"}):
    checkpoint = load_run(path, step)
  other = checkpoint.experiment
  for what, found, expected in (
    ("input", other.model.input_shape, experiment.model.input_shape),
    ("condition", other.model.conditioning, experiment.model.conditioning),
    ("process", other.settings.diffusion, experiment.settings.diffusion),
  ):
    if found != expected:
      raise SettingError(
        "weak_checkpoint",
        str(path),
        f"must have the {what} of the network that it guides: {expected}, has {found}",
      )
  weak = WeakNetwork(other.model, checkpoint.params, checkpoint.step)
  tokens = guidance.tokens
  if (
    tokens.weak_condition == "same"
    and tokens.strong == tokens.weak
    and weak.step == own_step
    and weak.model == experiment.model
    and jax.tree.all(jax.tree.map(np.array_equal, weak.params, own_params))
  ):
    accepted = "must hold other parameters: both passes would be the same"
    raise SettingError("weak_checkpoint", str(path), accepted)
  return weak
