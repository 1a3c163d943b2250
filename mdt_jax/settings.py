"""Every setting of a run, with its default and what it does.

One frozen dataclass holds the settings of a group. In a config file a setting is
`config.GROUP.NAME = VALUE`, on the command line --config.GROUP.NAME=VALUE. The settings
of `Settings`, at the end, have no group: --config.batch_size=64.

The comment above a setting says what it does, its unit and its range. The defaults are
those of MDTv2-S/2 on ImageNet 256x256. `Settings.from_config` turns a ConfigDict into
settings and checks each one; `mdt_jax.build` builds the objects of a run and checks
that the settings fit together. An error names the setting as `config.GROUP.NAME`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdt_jax.diffusion.guidance import WHOLE
from mdt_jax.diffusion.samplers import METHODS
from mdt_jax.diffusion.schedules import SPACINGS
from mdt_jax.errors import SettingError, check_choice, named_in_errors
from mdt_jax.logs import logger
from mdt_jax.setting_limits import check_maxima
from mdt_jax.sizes import Size, to_size
from mdt_jax.typed_config import known_settings, parse, parse_value, to_config

LABELS_OF_SCORES = ("random", "balanced")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The network. A setting of None has the value of the preset that `name` chooses."""

  # Preset, a key of mdt_jax.MODELS: DiT-S/2, MDT-B/4, MDTv2-XL/2, ….
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
  # Width of the transformer; divisible by num_heads and by 4.
  hidden_size: int | None = None
  # Number of transformer blocks, without the side-interpolater; even for MDTv2.
  depth: int | None = None
  # Number of attention heads.
  num_heads: int | None = None
  # Number of blocks after the side-interpolater, in [1, depth]; DiT ignores it.
  decode_depth: int | None = None
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
  # masking), or an objective of your own (a key of mdt_jax.objectives.OBJECTIVES).
  # None: mdt if the network takes a mask and masking.ratio is above 0, otherwise plain.
  name: str | None = None
  # Arguments of an objective of your own: '{"margin": 0.5}'.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


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

  # gaussian (discrete DDPM), or a process of your own (a key of
  # mdt_jax.diffusion.PROCESSES).
  process: str = "gaussian"
  # Arguments of a process of your own: '{"scale": 2.0}'.
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

  def process_arguments(self) -> dict[str, Any]:
    """Arguments of the process, for `create_process`."""
    if self.process != "gaussian":
      return dict(self.arguments)
    if self.arguments:
      raise SettingError(
        "arguments", self.arguments, "are of a process of your own, not of gaussian"
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
    _at_least(self, "clip_shards", 1)
    if self.clip_shards > 1 and not self.clip_norm:
      raise SettingError(
        "clip_shards", self.clip_shards, "must be 1: clip_norm = 0 clips nothing"
      )


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The training data, and the autoencoder between images and latents."""

  # latents (written by mdt_jax.encode), images (decoded while training), npz (uint8
  # images in one file), arrays (float arrays) or digits (8x8 pixels, bundled).
  source: str = "latents"
  # Where the data is. latents: folder of the set; images: a folder of images or .tar
  # files, a .tar file or tfds:NAME; npz: an .npz or .npy file; arrays: a folder of .npy
  # files, an .npz or .npy file; digits: None.
  path: str | None = None
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
      _at_least(self, name, 0)
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


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How images are drawn in training; also the defaults of mdt_jax.sample."""

  # Sampler: ddpm, ddim, euler, heun, dpm++ or dpm++sde.
  method: str = "ddpm"
  # Sampling steps, in [1, diffusion.num_timesteps]. euler, heun, dpm++ and dpm++sde
  # need 10 to 30 steps; heun calls the network twice a step.
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
  # Whether to clip the predicted x0 to [-1, 1] at each step; only for pixels.
  clip_denoised: bool = False
  # Decay of the averaged parameters to sample with, one of ema_decays. None: the first.
  ema_decay: float | None = None

  def check(self) -> None:
    check_choice("method", self.method, METHODS)
    if self.spacing is not None:
      check_choice("spacing", self.spacing, SPACINGS)
    if not 0 <= self.eta <= 1:
      raise SettingError("eta", self.eta, "must lie in [0, 1]")
    for name in ("cfg_scale", "cfg_power", "cfg_channels"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")
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
  # .npz of real images or of their statistics. None: the training data.
  reference: str | None = None
  # File with the weights of FID's Inception network: .safetensors of mdt_jax.convert,
  # .pth or .pb.
  inception: str | None = None

  @property
  def metric_names(self) -> list[str]:
    return self.metrics.split(",")

  def check(self) -> None:
    for name, least in (("every", 0), ("num_images", 2), ("batch_size", 1)):
      _at_least(self, name, least)
    if self.labels is not None:
      check_choice("labels", self.labels, LABELS_OF_SCORES)


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run: those of each group, and those without a group."""

  # Seed of every random draw, in [0, 2**32). A draw depends on the seed and the step.
  seed: int = 0
  # Training steps of the whole run, at least 1.
  num_steps: int = 400_000
  # Images in a step, over all devices; divisible by the devices that divide the batch.
  batch_size: int = 256
  # Parts of a batch that are computed one after another, to save memory; at least 1.
  accumulation_steps: int = 1
  model: ModelSettings = ModelSettings()
  objective: ObjectiveSettings = ObjectiveSettings()
  masking: MaskingSettings = MaskingSettings()
  diffusion: DiffusionSettings = DiffusionSettings()
  # How training draws timesteps: uniform, or loss-second-moment (importance sampling
  # by the recent losses).
  timestep_sampler: str = "uniform"
  optimizer: OptimizerSettings = OptimizerSettings()
  # Decays of the averages of the parameters, each in [0, 1). Every decay adds a copy of
  # the parameters. The first average is sampled.
  ema_decays: tuple[float, ...] = (0.9999,)
  data: DataSettings = DataSettings()
  mesh: MeshSettings = MeshSettings()
  sampling: SamplingSettings = SamplingSettings()
  eval: EvalSettings = EvalSettings()
  # Steps between log lines and TensorBoard points, at least 1.
  log_every: int = 100
  # Steps between checkpoints, at least 1. The last step is always saved.
  checkpoint_every: int = 10_000
  # Minutes after which a checkpoint is saved in any case; 0: by steps alone.
  checkpoint_minutes: float = 0.0
  # Number of latest checkpoints to keep, at least 2.
  checkpoints_to_keep: int = 2
  # Also keep the checkpoints of multiples of this number of steps; 0: none.
  checkpoint_keep_every: int = 0
  # Saves that may fail in a row before the run stops, at least 1.
  save_failures: int = 5
  # Seconds from SIGTERM or Ctrl-C until the process ends, saved or not; at least 1.
  grace_seconds: float = 60.0
  # Steps that may be skipped because their loss or gradient is not finite, at least 0.
  # One more stops the run, or rolls it back.
  max_skipped: int = 10
  # How often the run may go back to its last checkpoint and leave out the batches
  # since, instead of stopping; at least 0.
  max_rollbacks: int = 0
  # Steps between pictures of samples, at least 0; 0: no pictures.
  sample_every: int = 10_000
  # Images in a picture, at least 0; 0: no pictures.
  num_samples: int = 16

  @classmethod
  def from_config(cls, config: ConfigDict) -> Settings:
    """Returns the settings of a config that has all of them, and checks each one.

    Raises:
      SettingError: a setting is missing, unknown, of another type or out of range.
    """
    settings = parse(cls, config, "config")
    settings.check()
    return settings

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Settings:
    """Returns the settings in a checkpoint's JSON; missing ones have their defaults."""
    return cls.from_config(config_from_dict(saved))

  def to_config(self) -> ConfigDict:
    """Returns a locked ConfigDict; only the groups `arguments` take new names."""
    config = to_config(self).lock()
    for name in ("objective", "diffusion", "optimizer"):
      group: Any = config[name]
      group.arguments.unlock()
    return config

  def to_dict(self) -> dict[str, Any]:
    """Returns nested dicts, as checkpoints hold them."""
    return self.to_config().to_dict()

  def check(self) -> None:
    """Raises SettingError for the first setting that is out of its range."""
    with named_in_errors("config"):
      for name in ("num_steps", "batch_size", "accumulation_steps", "log_every"):
        _at_least(self, name, 1)
      _at_least(self, "checkpoint_every", 1)
      # A single checkpoint would be removed before the next one is complete.
      _at_least(self, "checkpoints_to_keep", 2)
      for name in ("seed", "sample_every", "num_samples", "checkpoint_minutes"):
        _at_least(self, name, 0)
      for name in ("checkpoint_keep_every", "max_skipped", "max_rollbacks"):
        _at_least(self, name, 0)
      for name in ("save_failures", "grace_seconds"):
        _at_least(self, name, 1)
      if self.seed >= 2**32:
        raise SettingError("seed", self.seed, "must be below 2**32")
    for group in ("data", "optimizer", "eval"):
      with named_in_errors(f"config.{group}"):
        getattr(self, group).check()
    decays = self.ema_decays
    if not decays or not all(
      isinstance(decay, (int, float)) and 0 <= decay < 1 for decay in decays
    ):
      raise SettingError(
        "config.ema_decays", decays, "must be one or more numbers in [0, 1)"
      )
    self._check_sampling()
    check_maxima(dataclasses.asdict(self))

  @property
  def sampled_decay(self) -> float:
    """Decay of the averaged parameters that are sampled."""
    chosen = self.sampling.ema_decay
    return self.ema_decays[0] if chosen is None else chosen

  def with_sampling(self, changes: Mapping[str, Any]) -> Settings:
    """Returns these settings with changed settings of sampling.

    Args:
      changes: settings of config.sampling, such as {"num_steps": 50}; not ema_decay,
        which belongs to the parameters.

    Raises:
      SettingError: a name is unknown, or a value cannot be used.
    """
    known = {field.name for field in dataclasses.fields(SamplingSettings)}
    for name, value in changes.items():
      if name not in known:
        accepted = ", ".join(sorted(known))
        raise SettingError(name, value, f"is no setting of sampling: {accepted}")
      if name == "ema_decay":
        raise SettingError(
          f"config.sampling.{name}",
          value,
          "is chosen when a checkpoint is loaded: by --ema_decay, or "
          "Pipeline.from_checkpoint(…, ema_decay=…)",
        )
    types_of = typing.get_type_hints(SamplingSettings)
    parsed = {
      name: parse_value(value, types_of[name], f"config.sampling.{name}")
      for name, value in changes.items()
    }
    changed = dataclasses.replace(
      self, sampling=dataclasses.replace(self.sampling, **parsed)
    )
    changed._check_sampling()
    return changed

  def with_data(self, **changes: Any) -> Settings:
    """Returns these settings with changed settings of data, such as path or vae."""
    return dataclasses.replace(self, data=dataclasses.replace(self.data, **changes))

  def with_ema_decay(self, ema_decay: float) -> Settings:
    """Returns these settings with another average to sample."""
    sampling = dataclasses.replace(self.sampling, ema_decay=ema_decay)
    return dataclasses.replace(self, sampling=sampling)

  def _check_sampling(self) -> None:
    sampling = self.sampling
    with named_in_errors("config.sampling"):
      sampling.check()
      is_gaussian = self.diffusion.process == "gaussian"
      total = self.diffusion.num_timesteps if is_gaussian else math.inf
      if sampling.num_steps < 1 or sampling.num_steps > total >= 1:
        accepted = f"must lie in [1, config.diffusion.num_timesteps = {total}]"
        raise SettingError(
          "num_steps",
          sampling.num_steps,
          accepted if is_gaussian else "must be at least 1",
        )
      # A condition of your own may ignore label_dropout; the network's check sees it.
      is_label = self.model.condition == "label"
      if is_label and sampling.cfg_scale != 1 and self.model.label_dropout == 0:
        raise SettingError(
          "cfg_scale",
          sampling.cfg_scale,
          "must be 1: config.model.label_dropout = 0 trains no null label",
        )
      if sampling.ema_decay is not None:
        check_choice("ema_decay", sampling.ema_decay, self.ema_decays)


def config_from_dict(saved: Mapping[str, Any]) -> ConfigDict:
  """Returns the config in a checkpoint's JSON.

  Settings that the JSON lacks have their defaults. Settings that this version does not
  know are left out with a warning.
  """
  saved, unknown = known_settings(saved, Settings(), "config")
  if unknown:
    logger.warning("ignored settings of another version: %s", ", ".join(unknown))
  masking = dict(saved.get("masking", {}))
  objective = dict(saved.get("objective", {}))
  # Earlier versions ignored the width of a ratio of 0, and masked no tokens with 0, 0.
  name, ratio = objective.get("name"), masking.get("ratio")
  if name is None and ratio == 0:
    masking["width"] = 0.0
  elif name == "mdt" and ratio == 0 and masking.get("width") == 0:
    objective["name"] = "mdt_unmasked"
  saved = {**saved, "masking": masking, "objective": objective}
  if "ema_decays" in saved:
    saved["ema_decays"] = tuple(saved["ema_decays"])
  sampling = dict(saved.get("sampling", {}))
  if "cfg_interval" in sampling:
    sampling["cfg_interval"] = tuple(sampling["cfg_interval"])
  config = Settings().to_config()
  with config.unlocked():
    config.update({**saved, "sampling": sampling})
  return config


def _at_least(settings: Any, name: str, least: int) -> None:
  if getattr(settings, name) < least:
    raise SettingError(name, getattr(settings, name), f"must be at least {least}")
