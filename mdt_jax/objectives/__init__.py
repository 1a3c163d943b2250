"""Objectives: the random draws and the loss of a training step."""

from mdt_jax.objectives.maskdit import MaskDiTObjective
from mdt_jax.objectives.mdt import MDTObjective
from mdt_jax.objectives.mdt_unmasked import MDTUnmaskedObjective
from mdt_jax.objectives.microdit import MicroDiTObjective
from mdt_jax.objectives.objective import (
  OBJECTIVES,
  Draws,
  Objective,
  create_objective,
  objective_of_class,
)
from mdt_jax.objectives.plain import PlainObjective
from mdt_jax.objectives.sprint import SPRINTObjective
from mdt_jax.objectives.tokens import TokenObjective
from mdt_jax.objectives.tread import TREADObjective
from mdt_jax.objectives.unmasked_phase import UnmaskedPhase

__all__ = [
  "OBJECTIVES",
  "Draws",
  "MDTObjective",
  "MDTUnmaskedObjective",
  "MaskDiTObjective",
  "MicroDiTObjective",
  "Objective",
  "PlainObjective",
  "SPRINTObjective",
  "TREADObjective",
  "TokenObjective",
  "UnmaskedPhase",
  "create_objective",
  "objective_of_class",
]
