"""The groups of settings of a run, with their defaults and what they do.

One frozen dataclass holds the settings of a group. In a config file a setting is
`config.GROUP.NAME = VALUE`, on the command line --config.GROUP.NAME=VALUE. The comment
above a setting says what it does, its unit and its range. The defaults are those of
MDTv2-S/2 on ImageNet 256x256. `settings.Settings` holds the groups and the settings
without a group.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mdt_jax.diffusion.guidance import RATIO_SCHEDULES, WEAK_CONDITIONS, WHOLE
from mdt_jax.diffusion.samplers import METHODS
from mdt_jax.diffusion.schedules import SPACINGS
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.sizes import Size, to_size

LABELS_OF_SCORES = ("random", "balanced")


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
  # What the network is conditioned on: label, or a condition of your own (a key of
  # mdt_jax.models.conditions.CONDITIONS).
  condition: str = "label"
  # Probability, in [0, 1), of training on an example without its condition. Guidance
  # (sampling.cfg_scale other than 1) needs a value above 0.
  label_dropout: float = 0.1
  # Type of the computation: float32 or bfloat16. Parameters are float32 in either case.
  dtype: str = "float32"
  # What the backward pass recomputes, to save memory: none, full (all but the inputs of
  # the blocks) or dots (all but the matrix products).
  remat: str = "none"
  # Blocks in each iteration of the compiled loop over blocks, at least 1; -1: all
  # blocks, which compiles longer and runs faster on CPUs.
  unroll: int = 1
  # Whether jax.jvp can differentiate the network. Gradients are slower then.
  forward_mode: bool = False

  def __post_init__(self) -> None:
    # (32, 32) is 32, so that settings of the same network are equal.
    size = to_size(self.input_size, "input_size")
    object.__setattr__(self, "input_size", size)


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


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The optimizer and its learning rate.

  b1, b2, b3 and eps of None have the optimizer's own values: 0.98, 0.92, 0.99 and 1e-8
  for adan, 0.9, 0.999 and 1e-8 for adamw.
  """

  # adan (MDTv2), adamw (MDT v1 and DiT), or an optimizer of optax, such as lion.
  name: str = "adan"
  # Largest learning rate; above 0.
  learning_rate: float = 3e-4
  # Learning rate after the warmup: constant, or cosine or linear to 0 at num_steps.
  schedule: str = "constant"
  # Steps in which the learning rate rises linearly from 0, in [0, num_steps).
  warmup_steps: int = 0
  # Decay of the average of gradients, in [0, 1).
  b1: float | None = None
  # Decay of the second average, in [0, 1): of squared gradients (adamw), of
  # differences of gradients (adan).
  b2: float | None = None
  # Decay of the average of squared gradients of adan, in [0, 1).
  b3: float | None = None
  # Number that is added to the denominator; above 0.
  eps: float | None = None
  # Strength of the weight decay, at least 0.
  weight_decay: float = 0.0
  # Gradients of a larger global norm are scaled down to this norm; 0: no limit.
  clip_norm: float = 1.0
  # Shards of the parameters, each of which is scaled down to clip_norm by its own norm;
  # 1: by the norm of all parameters. A released run of MDTv2 on N GPUs clips N shards,
  # because it puts Adan into PyTorch's ZeroRedundancyOptimizer (docs/parity.md).
  clip_shards: int = 1
  # Parameters that are not trained: regular expressions with commas between them,
  # searched for in paths such as decode_blocks/attention/qkv/kernel; or few_shot (all
  # but labels and adaLN) or difffit (all but biases and labels). Empty: none.
  frozen: str = ""
  # Learning rates of some parameters, PATTERN:RATE with commas between them; the first
  # pattern that matches a path decides: 'label_embed:1e-3,modulation:5e-4'. The
  # schedule stays.
  learning_rates: str = ""
  # More arguments of an optimizer of optax, such as '{"momentum": 0.9}' for sgd.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

  def check(self) -> None:
    for name in ("learning_rate", "eps"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise SettingError(name, value, "must be above 0")
    for name in ("weight_decay", "clip_norm"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")
    at_least(self, "clip_shards", 1)
    if self.clip_shards > 1 and not self.clip_norm:
      raise SettingError(
        "clip_shards", self.clip_shards, "must be 1: clip_norm = 0 clips nothing"
      )
    if self.clip_shards > 1 and self.frozen:
      raise SettingError(
        "clip_shards", self.clip_shards, "must be 1 if parameters are frozen"
      )


@dataclasses.dataclass(frozen=True)
class InitSettings:
  """Trained weights that a new run starts from; docs/finetune.md.

  A run with checkpoints resumes from these and does not read the weights.
  """

  # Where the weights are: the workdir of a run or of mdt_jax.convert, a released .pt,
  # .pth, .bin or .safetensors file, or a DiT in diffusers' format, local or in a bucket
  # (gs://…); or hf://ORG/NAME or hf://ORG/NAME/FILE on the Hugging Face hub. None:
  # random weights.
  path: str | None = None
  # Step of the checkpoint in a workdir. None: the latest.
  step: int | None = None
  # Decay of the averaged parameters in a workdir. None: the one that is sampled.
  ema_decay: float | None = None
  # What a file holds, such as DiT, SiT, MDTv2 or TREAD. None: what its tensors
  # show.
  network: str | None = None
  # Classes of the network in a file, without the null label. None: what its tensors
  # show; see --num_classes of mdt_jax.convert.
  num_classes: int | None = None
  # Classes whose labels are kept, OLD:NEW with commas between them, each a number or a
  # name: 'golden retriever:0,281:cat'. Empty: all if the numbers of classes are equal,
  # else none but the null label.
  classes: str = ""
  # Patch embedding and last layer of another patch size: resize or fresh.
  patches: str = "resize"
  # Whether to take what fits of a network of another depth or variant.
  partial: bool = False
  # CRC-32 of the weights, 8 hexadecimal digits. None: any; the run sets it.
  checksum: str | None = None

  def check(self) -> None:
    check_choice("patches", self.patches, ("resize", "fresh"))
    if self.step is not None:
      at_least(self, "step", 0)
    if self.num_classes is not None:
      at_least(self, "num_classes", 1)
    for item in split_commas(self.classes):
      if not all(item.rpartition(":")):
        raise SettingError(
          "classes", self.classes, "must be OLD:NEW, with commas between such pairs"
        )
    if self.path is None:
      for field in dataclasses.fields(self):
        if getattr(self, field.name) != field.default:
          raise SettingError(
            field.name, getattr(self, field.name), "needs config.init.path"
          )


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The training data, and the autoencoder between images and latents."""

  # latents (written by mdt_jax.encode), images (decoded while training), npz (uint8
  # images in one file), arrays (float arrays) or digits (8x8 pixels, bundled).
  source: str = "latents"
  # Where the data is. latents: folder of the set; images: a folder of images or .tar
  # files, a .tar file or tfds:NAME; npz: an .npz or .npy file; arrays: a folder of .npy
  # files, an .npz or .npy file; digits: None. Only latents may be in a bucket, gs://….
  path: str | None = None
  # Folder on a local disk that receives a copy of latents in a bucket, before training:
  # each host needs room for the whole set (docs/data.md). Needed if `path` is gs://…;
  # without effect on a local path.
  cache: str | None = None
  # Split of a tfds: data set.
  split: str = "train"
  # Bits of the values in image files of more than 8 bits, in [8, 16]: the value
  # 2**image_bits - 1 is white. Cameras and scanners store 10, 12 or 14 bits in 16.
  image_bits: int = 16
  # Share of the examples that is held out of training, in [0, 0.5].
  validation: float = 0.0
  # Autoencoder, a folder or the id of one on the Hugging Face hub. It encodes the
  # images of the sources images and npz, and decodes sampled latents. None: no
  # autoencoder; the network works on pixels, or samples stay latents.
  vae: str | None = None
  # Whether to mirror each image left to right with probability 1/2. The source arrays
  # is never mirrored.
  flip: bool = True
  # Unreadable examples that each reading process skips; one more stops the run.
  max_unreadable: int = 100
  # Processes that read examples, at least 0; 0: threads of the training process.
  num_workers: int = 0
  # Batches read at the same time, at least 0; 0: reads in the thread that trains.
  num_threads: int = 8

  def check(self) -> None:
    for name in ("max_unreadable", "num_threads", "num_workers"):
      at_least(self, name, 0)
    if not 8 <= self.image_bits <= 16:
      raise SettingError("image_bits", self.image_bits, "must lie in [8, 16]")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Number of devices along each axis of the mesh.

  The product is the number of devices. One axis may be -1: all devices that remain.
  """

  # Devices that divide the batch and hold copies of the state (data parallelism).
  data: int = -1
  # Devices that divide the batch and the state (fully sharded data parallelism).
  fsdp: int = 1
  # Devices that divide attention heads and hidden units of the same images.
  tensor: int = 1
  # Slices of TPUs, or hosts of GPUs, between which the network is slow; they divide the
  # axis data. -1: as many as the devices report. 1: all links are taken as equal.
  slices: int = -1


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How images are drawn in training; also the defaults of mdt_jax.sample."""

  # Sampler: ddpm or ddim (process gaussian); euler, heun, dpm++ or dpm++sde (every
  # process); ode_euler, ode_midpoint, ode_heun, ode_heun3, ode_rk4, sde, sde_heun or
  # edm (processes in continuous time, such as flow and edm). See docs/sampling.md.
  method: str = "ddpm"
  # More arguments of sde, sde_heun ('{"diffusion": "sbdm", "last_step": "tweedie"}') or
  # edm ('{"churn": 40.0}').
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Sampling steps, at least 1; at most diffusion.num_timesteps for gaussian. euler,
  # heun, dpm++ and dpm++sde need 10 to 30 steps; heun calls the network twice a step.
  num_steps: int = 250
  # How the times of the steps are spaced: uniform, log_snr or karras. None: the
  # sampler's own spacing.
  spacing: str | None = None
  # Noise that ddim adds at each step, in [0, 1]: 0 none, 1 as much as ddpm.
  eta: float = 0.0
  # Scale of classifier-free guidance, at least 0; 1: no guidance.
  cfg_scale: float = 3.8
  # Power of the power-cosine schedule of the scale (MDT, section 4.1), at least 0: the
  # scale grows from 1 at full noise to cfg_scale; 0: a constant scale.
  cfg_power: float = 4.0
  # Number of leading channels to guide, as released; 0: all channels.
  cfg_channels: int = 3
  # (low, high): guide only where t / T lies in it; 0 <= low <= high <= 1.
  cfg_interval: tuple[float, float] = WHOLE
  # Condition of the weak pass, away from which guidance leads: null (classifier-free
  # guidance) or same, as the strong pass (sparse guidance: weak_ratio must be above
  # strong_ratio). See docs/sampling.md.
  weak_condition: str = "null"
  # Shares of the tokens that the strong and the weak pass leave out, strong_ratio in
  # [0, 1) and weak_ratio in [strong_ratio, 1]; 1 drops the path of SPRINT. Networks of
  # MDT, MaskDiT, TREAD and SPRINT. A cfg_scale of 1 has no weak pass.
  strong_ratio: float = 0.0
  weak_ratio: float = 0.0
  # How the shares change over sampling: constant; or cosine: that of the weak pass
  # falls to 0, that of the strong pass rises from 0.
  ratio_schedule: str = "constant"
  # Whether to clip the predicted x0 to [-1, 1] at each step; only for pixels.
  clip_denoised: bool = False
  # Decay of the averaged parameters to sample with, one of ema_decays. None: the first.
  ema_decay: float | None = None

  @property
  def needs_null(self) -> bool:
    """Whether guidance needs a network that is trained without conditions."""
    return self.cfg_scale != 1 and self.weak_condition == "null"

  def check(self) -> None:
    check_choice("method", self.method, METHODS)
    if self.spacing is not None:
      check_choice("spacing", self.spacing, SPACINGS)
    if not 0 <= self.eta <= 1:
      raise SettingError("eta", self.eta, "must lie in [0, 1]")
    for name in ("cfg_scale", "cfg_power", "cfg_channels"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")
    check_choice("weak_condition", self.weak_condition, WEAK_CONDITIONS)
    check_choice("ratio_schedule", self.ratio_schedule, RATIO_SCHEDULES)
    if not 0 <= self.strong_ratio < 1:
      raise SettingError("strong_ratio", self.strong_ratio, "must lie in [0, 1)")
    if self.cfg_scale != 1 and not self.strong_ratio <= self.weak_ratio <= 1:
      accepted = f"must lie in [strong_ratio = {self.strong_ratio:g}, 1]"
      raise SettingError("weak_ratio", self.weak_ratio, accepted)
    pair = self.cfg_interval
    is_pair = len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)
    if not (is_pair and 0 <= pair[0] <= pair[1] <= 1):
      raise SettingError(
        "cfg_interval", tuple(pair), "must be (low, high), 0 <= low <= high <= 1"
      )


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Scores of sampled images during training; docs/evaluation.md explains them."""

  # Steps between evaluations, at least 0; 0: none.
  every: int = 0
  # Scores with commas between them: fid, sfid, is, precision, recall (these five need
  # `inception`), frechet, accuracy, diversity (for small images).
  metrics: str = "fid"
  # Images to sample as config.sampling says, at least 2. Papers sample 50,000.
  num_images: int = 10_000
  # Images at once, over all devices; at least 1.
  batch_size: int = 64
  # Labels of these images: random (as in the released scripts) or balanced (all classes
  # in turn). None: random if a score needs `inception`, else balanced.
  labels: str | None = None
  # .npz of real images or of their statistics, local or in a bucket. None: the training
  # data.
  reference: str | None = None
  # File with the weights of FID's Inception network: .safetensors of mdt_jax.convert,
  # .pth or .pb.
  inception: str | None = None

  @property
  def metric_names(self) -> list[str]:
    return self.metrics.split(",")

  def check(self) -> None:
    for name, least in (("every", 0), ("num_images", 2), ("batch_size", 1)):
      at_least(self, name, least)
    if self.labels is not None:
      check_choice("labels", self.labels, LABELS_OF_SCORES)


@dataclasses.dataclass(frozen=True)
class LogSettings:
  """Where the metrics go, besides the log, WORKDIR/tensorboard and metrics.jsonl."""

  # Project of Weights & Biases that receives metrics and pictures; needs the extra
  # wandb. None: no project.
  wandb_project: str | None = None

  def check(self) -> None:
    name = self.wandb_project
    if name is not None and not (
      0 < len(name) <= 128 and not set(name) & set("/\\#?%:")
    ):
      raise SettingError(
        "wandb_project",
        name,
        "must be a name of 1 to 128 characters, without any of / \\ # ? % :",
      )


def split_commas(text: str) -> tuple[str, ...]:
  """The parts of a text between commas, without spaces around them or empty parts.

  A comma inside brackets is part of a regular expression, such as blocks/fc[1,2] or
  a{2,3}.
  """
  parts, depth = [""], 0
  for character in text:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and depth <= 0:
      parts.append("")
    else:
      parts[-1] += character
  return tuple(part for part in map(str.strip, parts) if part)


def at_least(settings: Any, name: str, least: int) -> None:
  """Raises SettingError if a setting of a group is smaller than `least`."""
  if getattr(settings, name) < least:
    raise SettingError(name, getattr(settings, name), f"must be at least {least}")
