"""A network of its own for the weak pass of guidance, such as an earlier checkpoint."""

from __future__ import annotations

import dataclasses
import os

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
  path: str | os.PathLike[str], step: int | None, experiment: Experiment
) -> WeakNetwork:
  """Loads the network of the weak pass.

  Args:
    path, step: see `checkpoints.hub_folders.load_run`; the average is the one that the
      run samples.
    experiment: objects of the run whose network is guided.

  Raises:
    SettingError: setting "weak_checkpoint": the checkpoint cannot be loaded, or its
      network has another input, condition or process.
  """
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
  return WeakNetwork(other.model, checkpoint.params, checkpoint.step)
