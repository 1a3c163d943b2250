"""User-defined objects that replace objects of the settings."""

from __future__ import annotations

import dataclasses

import optax

from mdt_jax.data.examples import Source
from mdt_jax.models.registry import Model
from mdt_jax.objectives import Objective


@dataclasses.dataclass(frozen=True)
class OwnParts:
  """User-defined objects of a run. None: the object that the settings describe.

  Attributes:
    model: a network; replaces `config.model`.
    objective: an objective, or a class that is called with (model, process,
      timestep_sampler); replaces `config.objective`.
    optimizer: an optax optimizer; replaces `config.optimizer`.
    source: labelled examples, see `data.examples.Source`; replaces the data of
      `config.data`.
  """

  model: Model | None = None
  objective: Objective | type[Objective] | None = None
  optimizer: optax.GradientTransformation | None = None
  source: Source | None = None
