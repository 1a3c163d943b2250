"""Settings of the network, the objective and the process."""

from __future__ import annotations

import dataclasses
from typing import Any

from mdt_jax.errors import SettingError
from mdt_jax.sizes import Size, to_size


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The network. A setting of None has the value of the preset that `name` chooses."""

  # Preset, a key of mdt_jax.MODELS: DiT-S/2, SiT-L/2, MDT-B/4, MDTv2-XL/2, TREAD-B/2,
  # MaskDiT-B/2, SPRINT-B/2, ….
  name: str = "MDTv2-S/2"
  # Height and width of the network's input, in pixels or latents, each divisible by
  # patch_size: one number for a square, such as 32 for the latents of 256x256 images,
  # or (height, width), such as (32, 48) for those of images 256 high and 384 wide.
  input_size: Size = 32
  # Channels of the input: 4 for latents, 3 for RGB, 1 for grey images.
  in_channels: int = 4
  # Number of classes, at least 1. Labels lie in [0, num_classes); 1: unconditional.
  num_classes: int = 1000
  # Height and width of a patch, in pixels or latents; a patch is one token.
  patch_size: int | None = None
  # Width of a linear layer between a patch and its token, at least 0; 0: none. Large
  # patches of pixels use it, such as 128 for patches of 16x16x3 (JiT).
  patch_bottleneck: int = 0
  # Width of the transformer; divisible by num_heads and by 4.
  hidden_size: int | None = None
  # Number of transformer blocks, without the side-interpolater; even for MDTv2.
  depth: int | None = None
  # Number of attention heads.
  num_heads: int | None = None
  # Number of blocks after the side-interpolater, in [1, depth], for MDT and MDTv2, or
  # after the middle blocks, for SPRINT; or of the decoder, which depth does not count,
  # for MaskDiT.
  decode_depth: int | None = None
  # Width and attention heads of the decoder, for MaskDiT; None: 512 and 16, as
  # released. The width is divisible by the heads and by 4.
  decoder_hidden_size: int | None = None
  decoder_num_heads: int | None = None
  # Number of blocks before the middle blocks, at least 1, for SPRINT. The middle blocks
  # are the depth - encoder_depth - decode_depth blocks that see only the kept tokens.
  encoder_depth: int | None = None
  # How a mask chooses the kept tokens of SPRINT: structured (equally many of each group
  # of 2x2 or 4x4 tokens) or random. None: structured, as released.
  mask_type: str | None = None
  # First and last block that see only the kept tokens, for TREAD, counted from 0; 0 <=
  # route_start <= route_end < depth. None: 2 and depth - 4, as released.
  route_start: int | None = None
  route_end: int | None = None
  # Blocks, width and heads of the mixer of a MicroDiT, which sees all tokens; at least
  # 1. The width is divisible by the heads. None: those of the preset.
  mixer_depth: int | None = None
  mixer_hidden_size: int | None = None
  mixer_num_heads: int | None = None
  # Hidden width of the MLPs, as a multiple of hidden_size; above 0.
  mlp_ratio: float = 4.0
  # What the network is conditioned on: label, vector, tokens (arrays of the data, see
  # config.condition), several joined by +, such as label+vector, or a condition of your
  # own (a key of mdt_jax.models.conditions.CONDITIONS). See docs/conditions.md.
  condition: str = "label"
  # Probability, in [0, 1), of training on an example without its condition. Guidance
  # (sampling.cfg_scale other than 1) needs a value above 0.
  label_dropout: float = 0.1
  # Type of the computation: float32 or bfloat16. Parameters are float32 in either case.
  dtype: str = "float32"
  # To save memory, the backward pass can recompute what the forward pass does not keep.
  # What is kept: none: every activation; full: the input of each block; attention: also
  # the output of attention; linear: also the outputs of linear layers; offload: the
  # same, in the memory of the host; dots: as linear, and the logits of attention. See
  # docs/performance.md.
  remat: str = "none"
  # Blocks in each iteration of the compiled loop over blocks, at least 1; -1: all
  # blocks, which compiles longer and runs faster on CPUs and GPUs.
  unroll: int = 1
  # How attention is computed: plain (matrix products), cudnn (the fused kernel of
  # cuDNN: NVIDIA GPUs, bfloat16), pallas (a fused kernel for TPUs) or auto (cudnn where
  # it runs, else plain; the log says which). See docs/performance.md.
  attention_kernel: str = "plain"
  # Whether jax.jvp can differentiate the network. Gradients are slower then.
  forward_mode: bool = False

  def __post_init__(self) -> None:
    # (32, 32) is 32, so that settings of the same network are equal.
    size = to_size(self.input_size, "input_size")
    object.__setattr__(self, "input_size", size)


@dataclasses.dataclass(frozen=True)
class ConditionSettings:
  """The arrays of the data that condition a network; see config.model.condition."""

  # Name of the array (vector_size,) of an example that is the condition vector, such as
  # the embedding of an image or of a text by another network.
  vector: str = "vector"
  # Numbers in the vector, at least 2, or 1 without vector_norm; 0: the network has no
  # condition vector.
  vector_size: int = 0
  # Whether the vector passes a LayerNorm first, which removes its scale. False for
  # measured quantities, which should be of the order of 1.
  vector_norm: bool = True
  # Name of the array (tokens_length, tokens_size) of an example that is the condition
  # tokens, such as the states of a text encoder. An array of this name and _mask,
  # (tokens_length,), is above 0 where a token is no padding.
  tokens: str = "tokens"
  # Tokens of a condition, and numbers in a token, at least 1; 0: the network has no
  # condition tokens.
  tokens_length: int = 0
  tokens_size: int = 0
  # How the conditions of an example are dropped for guidance: together (all or none,
  # with the probability config.model.label_dropout) or apart (each by its own draw).
  drop: str = "together"
  # Probability, in [0, 1), of dropping the vector or the tokens of an example, if drop
  # is apart. None: config.model.label_dropout.
  vector_dropout: float | None = None
  tokens_dropout: float | None = None

  def check_use(self, condition: str) -> None:
    """Raises SettingError if sizes are set that config.model.condition ignores."""
    if not {"label", "vector", "tokens"}.issuperset(condition.split("+")):
      return  # a condition of your own may read any of them
    default = ConditionSettings()
    for field in dataclasses.fields(self):
      kind = field.name.split("_")[0]
      value = getattr(self, field.name)
      if value != getattr(default, field.name) and kind not in condition.split("+"):
        if kind == "drop" and "+" in condition:
          continue
        accepted = f"has no effect: config.model.condition is {condition!r}"
        raise SettingError(field.name, value, accepted)


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
  """The random draws and the loss of a training step."""

  # plain (one pass over all tokens), mdt (a second pass over the tokens that a mask
  # keeps), mdt_unmasked (two passes over all tokens: the control of experiments on
  # masking); one pass, in which some blocks see only a part of the tokens: maskdit,
  # microdit, tread or sprint; or an objective of your own (a key of
  # mdt_jax.objectives.OBJECTIVES). None: that of the network, such as tread for a
  # TREAD; mdt for an MDT needs a masking.ratio above 0. See docs/methods.md.
  name: str | None = None
  # Arguments of the objectives of one pass: '{"ratio": 0.5}', the share of removed
  # tokens, or '{"ratio": 0.6, "schedule": "cosine4", "min_ratio": 0.1}'; of maskdit
  # also '{"mae_weight": 0.1}', the weight of the reconstruction; of sprint also
  # '{"path_drop": 0.1}', the share of samples without a deep path. Or those of an
  # objective of your own.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  # First step of a last phase that trains on all tokens, in [0, num_steps]. None, or
  # num_steps: no such phase.
  unmasked_from: int | None = None


@dataclasses.dataclass(frozen=True)
class MaskingSettings:
  """The masked pass of the objective mdt; other objectives have none."""

  # Smallest share of tokens that a mask removes, in [0, 0.8]; 0: no masked pass.
  ratio: float = 0.3
  # The share is uniform in [ratio, ratio + width]; ratio + width is at most 0.8. MDT
  # v1: 0.
  width: float = 0.2
  # The masked pass keeps one of so many numbers of tokens, at least 1. Each number
  # compiles its own program.
  num_lengths: int = 4
  # The numbers of kept tokens are multiples of this, where the sequence is long enough.
  multiple: int = 8
  # Equal parts of the batch that keep different numbers of tokens, spread evenly over
  # the range: a released run on N GPUs draws N ratios a step. One program holds a
  # masked pass for each part; num_lengths and multiple have no effect. 1: all images of
  # a step keep the same number.
  groups: int = 1


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
  """The process. Settings after `arguments` belong to the process gaussian."""

  # gaussian (discrete DDPM), flow (SiT, flow matching), edm, or a process of your own
  # (a key of mdt_jax.diffusion.PROCESSES). See docs/processes.md.
  process: str = "gaussian"
  # Arguments of any other process than gaussian: '{"path": "gvp"}'.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Noise schedule: linear or cosine.
  schedule: str = "linear"
  # Number T of timesteps, at least 1.
  num_timesteps: int = 1000
  # What the network predicts: epsilon (the noise), x0 (the clean image) or v.
  prediction: str = "epsilon"
  # Variance of the reverse steps: learned_range (the network has twice as many output
  # channels), fixed_small or fixed_large.
  variance: str = "learned_range"
  # Weight of the squared error by timestep: none (DiT, MDT v1) or min_snr (MDTv2).
  loss_weight: str = "min_snr"
  # Largest signal-to-noise ratio that min_snr counts (gamma in arXiv 2303.09556).
  min_snr_gamma: float = 5.0

  @property
  def without_effect(self) -> dict[str, Any]:
    """Settings of gaussian with other values than the defaults, if it is not in use."""
    if self.process == "gaussian":
      return {}
    default = DiffusionSettings(self.process, self.arguments)
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != getattr(default, field.name)
    }

  def process_arguments(self) -> dict[str, Any]:
    """Arguments of the process, for `create_process`."""
    if self.process != "gaussian":
      return dict(self.arguments)
    if self.arguments:
      raise SettingError(
        "arguments", self.arguments, "must be empty for the process gaussian"
      )
    named = dataclasses.asdict(self)
    return {name: named[name] for name in named if name not in ("process", "arguments")}
