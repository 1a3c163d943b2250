"""Parts of a run that a researcher brings, instead of those that settings describe."""

from __future__ import annotations

import dataclasses

import optax

from mdt_jax.data.examples import Source
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class OwnParts:
  """Parts that are used instead of those of the settings; None for the settings'.

  Attributes:
    model: a network; the group `settings.model` is not used then.
    objective: an objective, or its class, which is called with (model, process,
      timestep sampler).
    optimizer: an optimizer of optax; the group `settings.optimizer` is not used then.
    source: examples, see `data.examples.Source`.
  """

  model: Model | None = None
  objective: Objective | type[Objective] | None = None
  optimizer: optax.GradientTransformation | None = None
  source: Source | None = None
