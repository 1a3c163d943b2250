"""Arms and conditions of the experiment on relations; see benchmarks/relations.py.

A condition is a data set, with the size of the network and the budget of steps. An arm
is a network with an objective. All arms of a condition have the same data, process,
optimizer and batch, but for what the arm's name says.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mdt_jax import build
from mdt_jax.config import default_config
from mdt_jax.data.relations import Relations
from mdt_jax.experiment import Experiment
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.models.mdt import MDT
from mdt_jax.models.mdt_flops import forward_flops, skip_flops
from mdt_jax.objectives.mdt import MDTObjective
from mdt_jax.objectives.objective import Apply, Draws, Losses
from mdt_jax.objectives.tokens import mean_over
from mdt_jax.types import Array, Params

# What MDTv2's network has and DiT's has not, without a masked pass.
PIECES = ("bias", "positions", "skips", "shortcuts")
RATIOS = {"10_30": (0.1, 0.2), "30_50": (0.3, 0.2), "50_70": (0.5, 0.2)}
UNMASKED_END = 0.9  # share of the steps after which the arms "_end" train on all tokens


class PartialMDT(MDT, kw_only=True):
  """MDTv2 without a masked pass, and without some of its pieces.

  With all pieces it computes what MDTv2 does, with none what DiT does.

  Attributes (in addition to those of `MDT`):
    pieces: some of PIECES. bias: relative position bias in each block. positions:
      trained positions, added again before the decoder. skips: long skips from
      in-blocks to out-blocks. shortcuts: skips from the embedded input to each decode
      block.
  """

  pieces: tuple[str, ...] = PIECES

  @property
  def frozen(self) -> tuple[str, ...]:
    return () if "positions" in self.pieces else ("pos_embed",)

  def _encode(self, tokens: Array, c: Array, index: Array, token_mask: Any) -> Array:
    assert token_mask is None, "this network has no masked pass"
    if "skips" in self.pieces:
      return super()._encode(tokens, c, index, None)
    blocks = self._blocks("blocks", self.depth - self.decode_depth)
    return blocks(tokens, c, index, None)[0]

  def _interpolate(
    self, tokens: Array, c: Array, index: Array, token_mask: Any
  ) -> Array:
    del c, index, token_mask  # no token is missing
    if "positions" not in self.pieces:
      return tokens
    return tokens + self._positions("decode_pos_embed")

  def _decode(self, tokens: Array, embedded: Array, c: Array, index: Array) -> Array:
    skip = embedded if "shortcuts" in self.pieces else None
    return self._blocks("decode_blocks", self.decode_depth)(tokens, c, index, skip)[0]

  def _block_attributes(self) -> dict[str, Any]:
    attributes = super()._block_attributes()
    return attributes if "bias" in self.pieces else {**attributes, "bias_rows": 0}

  @property
  def missing_flops(self) -> int:
    """Operations of a forward pass that MDTv2 has and this network has not."""
    one = skip_flops(self, self.num_tokens)
    skips = (self.depth - self.decode_depth) // 2 * ("skips" not in self.pieces)
    return one * (skips + self.decode_depth * ("shortcuts" not in self.pieces))


class MaskedTokensAlone(MDTObjective):
  """MDT, but the loss of the masked pass counts the removed tokens alone."""

  def _masked_losses(
    self, apply: Apply, params: Params, draws: Draws, lengths: tuple[int, ...]
  ) -> Losses:
    (length,) = lengths
    mask = token_mask_from_noise(draws.mask_noise, length)
    removed = mean_over(mask.removed, self.model.patch_size)
    return self.pass_losses(apply, params, draws, 1, mask, mean=removed)


@dataclasses.dataclass(frozen=True)
class Arm:
  """A network with an objective.

  Attributes:
    network: family of the network, such as "DiT".
    pieces: pieces of a `PartialMDT`; None for another network.
    objective: `config.objective.name`; None for that of the network.
    masking: smallest share of removed tokens and width, for MDT's masked pass.
    masked_alone: whether the loss is that of `MaskedTokensAlone`.
    unmasked_from: share of the steps after which the run trains on all tokens.
    depth: depth of the network as a multiple of the condition's.
    batch: batch as a multiple of the condition's.
  """

  network: str
  pieces: tuple[str, ...] | None = None
  objective: str | None = None
  masking: tuple[float, float] = (0.0, 0.0)
  masked_alone: bool = False
  unmasked_from: float | None = None
  depth: int = 1
  batch: int = 1


def _without(piece: str) -> tuple[str, ...]:
  return tuple(other for other in PIECES if other != piece)


def _masked(ratio: str = "30_50", **options: Any) -> Arm:
  return Arm("MDTv2", masking=RATIOS[ratio], **options)


METHODS = {
  "maskdit": "MaskDiT",
  "microdit": "MicroDiT",
  "tread": "TREAD",
  "sprint": "SPRINT",
}
ARMS: dict[str, Arm] = {
  "dit": Arm("DiT"),
  "dit_batch_x2": Arm("DiT", batch=2),
  "dit_depth_x2": Arm("DiT", depth=2),  # 0.88 of the FLOPs of a step of MDTv2
  **{f"dit_{piece}": Arm("MDTv2", pieces=(piece,)) for piece in PIECES},
  "mdtv2_unmasked": Arm("MDTv2", objective="plain"),
  **{f"mdtv2_no_{piece}": Arm("MDTv2", pieces=_without(piece)) for piece in PIECES},
  "mdtv2_two_unmasked": Arm("MDTv2", objective="mdt_unmasked"),
  **{f"mdtv2_masked_{ratio}": _masked(ratio) for ratio in RATIOS},
  "mdtv2_masked_alone": _masked(masked_alone=True),
  "mdtv2_masked_half": _masked(unmasked_from=0.5),
  "mdt_unmasked": Arm("MDT", objective="plain"),
  "mdt_two_unmasked": Arm("MDT", objective="mdt_unmasked"),
  "mdt_masked": Arm("MDT", masking=(0.3, 0.0)),
  # Up to the unmasked end, each of these is the method without one.
  **{
    f"{name}_end": Arm(network, unmasked_from=UNMASKED_END)
    for name, network in METHODS.items()
  },
}
# Arms of the larger conditions, which cost more.
MAIN_ARMS = (
  "dit",
  "dit_depth_x2",
  "dit_bias",
  "mdtv2_unmasked",
  "mdtv2_two_unmasked",
  "mdtv2_masked_30_50",
  "maskdit_end",
  "microdit_end",
  "tread_end",
  "sprint_end",
)


@dataclasses.dataclass(frozen=True)
class Condition:
  """A data set, with the size of the network and the budget of steps.

  Attributes:
    relations: the relations of the data.
    num_images: number of training images; None for endless data.
    tuned_on: condition whose learning rates the arms have; None to tune them.
    learning_rate: rate of all arms; None to tune it.
    part_of: condition that has the runs of this one; None for this one itself.
    arms: names of the arms.
    num_steps: training steps.
    hidden_size, depth, num_heads: size of the networks.
    batch_size: images in a step.
    num_samples: images of an evaluation.
    dtype: dtype of the networks.
  """

  relations: Relations
  num_images: int | None = None
  tuned_on: str | None = None
  learning_rate: float | None = None
  part_of: str | None = None
  arms: tuple[str, ...] = tuple(ARMS)
  num_steps: int = 3000
  hidden_size: int = 64
  depth: int = 4
  num_heads: int = 4
  batch_size: int = 32
  num_samples: int = 256
  dtype: str = "float32"


CELLS_16 = Relations(
  grid=4, glyph_size=2, glyphs=4, near_pairs=2, far_pairs=2, sums=1, counts=0
)
CELLS_64 = Relations(
  grid=8,
  glyph_size=2,
  glyphs=2,
  near_pairs=2,
  far_pairs=2,
  mirrored_rows=6,
  sums=1,
  counts=0,
)
CELLS_256 = Relations(
  grid=16,
  glyph_size=2,
  glyphs=4,
  near_pairs=8,
  far_pairs=8,
  mirrored_rows=8,
  sums=4,
  counts=2,
)
# Largest first: a machine that is given back early has run the arms that cost most.
GPU_ARMS = (
  "mdtv2_masked_30_50",
  "mdtv2_two_unmasked",
  "dit_depth_x2",
  "mdtv2_unmasked",
  "dit",
)
CONDITIONS: dict[str, Condition] = {
  "16": Condition(CELLS_16),
  "64": Condition(CELLS_64, arms=MAIN_ARMS, num_steps=2000),
  "16_scarce": Condition(CELLS_16, 512, "16", arms=MAIN_ARMS),
  # The hypotheses again, without differences in the learning rate.
  "16_one_rate": Condition(
    CELLS_16,
    learning_rate=4e-3,
    part_of="16",
    arms=(
      "dit",
      "dit_batch_x2",
      "dit_depth_x2",
      *(f"dit_{piece}" for piece in PIECES),
      "mdtv2_unmasked",
      *(f"mdtv2_no_{piece}" for piece in PIECES),
      "mdtv2_two_unmasked",
      *(f"mdtv2_masked_{ratio}" for ratio in RATIOS),
    ),
  ),
  "64_one_rate": Condition(
    CELLS_64,
    learning_rate=4e-3,
    part_of="64",
    arms=(
      "dit",
      "dit_bias",
      "mdtv2_unmasked",
      "mdtv2_two_unmasked",
      "mdtv2_masked_30_50",
    ),
    num_steps=2000,
  ),
  # On a GPU: benchmarks/relations_gpu.sh
  "256": Condition(
    CELLS_256,
    learning_rate=1e-3,
    arms=GPU_ARMS,
    num_steps=1500,
    hidden_size=384,
    depth=12,
    num_heads=6,
    batch_size=64,
    dtype="bfloat16",
  ),
  # A tenth of it, to try the script on a CPU.
  "256_tiny": Condition(
    CELLS_256,
    learning_rate=1e-3,
    arms=GPU_ARMS,
    num_steps=150,
    hidden_size=36,
    num_heads=3,
    batch_size=6,
    num_samples=26,
    dtype="bfloat16",
  ),
}


def make_config(
  condition: Condition, arm: Arm, seed: int, learning_rate: float
) -> ConfigDict:
  """The config of a run, with an own network and objective left to `build_run`."""
  config = default_config()
  config.seed = seed
  config.num_steps = condition.num_steps
  config.batch_size = condition.batch_size * arm.batch
  relations = condition.relations
  depth = condition.depth * arm.depth
  config.model.name = f"{arm.network}-S/{relations.glyph_size}"
  config.model.input_size = relations.side
  config.model.in_channels = 1
  config.model.num_classes = 1
  config.model.label_dropout = 0.0
  config.model.hidden_size = condition.hidden_size
  config.model.depth = depth
  config.model.num_heads = condition.num_heads
  config.model.unroll = -1
  config.model.dtype = condition.dtype
  config.model.update(_own_sizes(arm.network, condition, depth))
  config.objective.name = "plain" if arm.pieces is not None else arm.objective
  if arm.unmasked_from is not None:
    config.objective.unmasked_from = round(arm.unmasked_from * condition.num_steps)
  config.masking.ratio, config.masking.width = arm.masking
  config.masking.num_lengths, config.masking.multiple = 3, 1
  config.diffusion.process = "flow"
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = learning_rate
  config.optimizer.warmup_steps = 50
  config.ema_decays = (0.99,)
  config.data.source = "relations"
  given = dataclasses.asdict(relations)
  given = {name: value for name, value in given.items() if value is not None}
  if condition.num_images is not None:
    given["num_images"] = condition.num_images
  config.data.arguments.update(given)
  config.data.flip = False
  config.data.num_threads = 0
  config.sampling.update({"method": "ode_euler", "num_steps": 20, "cfg_scale": 1.0})
  return config


def _own_sizes(network: str, condition: Condition, depth: int) -> dict[str, Any]:
  """Sizes that only some networks have, in the released proportions."""
  third = max(1, depth // 3)
  if network in ("MDT", "MDTv2"):
    return {"decode_depth": 2 * max(1, depth // 6)}  # even, as MDTv2 needs
  half = condition.hidden_size // 2
  if network == "MaskDiT":
    heads = condition.num_heads // 2
    return {
      "decode_depth": third,
      "decoder_hidden_size": half,
      "decoder_num_heads": heads,
    }
  if network == "MicroDiT":
    return {"mixer_depth": third}
  if network == "TREAD":
    return {"route_start": 1, "route_end": depth - 2}
  if network == "SPRINT":
    return {"encoder_depth": max(1, depth // 6), "decode_depth": max(1, depth // 6)}
  return {}


def build_run(
  condition: Condition, arm: Arm, seed: int, learning_rate: float
) -> Experiment:
  """Builds the objects of a run."""
  config = make_config(condition, arm, seed, learning_rate)
  model = objective = None
  if arm.pieces is not None:
    preset = build(config).model
    assert isinstance(preset, MDT)
    fields = {
      field.name: getattr(preset, field.name)
      for field in dataclasses.fields(MDT)
      if field.name not in ("parent", "name")
    }
    model = PartialMDT(**fields, pieces=arm.pieces)
  if arm.masked_alone:
    ratio, width = arm.masking
    lengths = dict(num_lengths=3, multiple=1)
    objective = functools.partial(
      MaskedTokensAlone, ratio=ratio, width=width, **lengths
    )
  return build(config, model=model, objective=objective)  # pyright: ignore


def step_flops(experiment: Experiment, num_steps: int, seed: int = 0) -> float:
  """Mean operations of a training step on a whole batch, over the first steps.

  Args:
    experiment: the run.
    num_steps: number of steps to average over.
    seed: seed of the run.
  """
  objective, model = experiment.objective, experiment.model
  if isinstance(model, PartialMDT):
    mean = 3.0 * (forward_flops(model) - model.missing_flops)
    return mean * experiment.settings.batch_size
  drawn = [objective.choose_static(seed, step) for step in range(num_steps)]
  one = {static: objective.flops(static) for static in set(drawn)}
  mean = float(np.mean([one[static] for static in drawn]))
  return mean * experiment.settings.batch_size
