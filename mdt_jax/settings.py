"""Every setting of a run with its default: one frozen dataclass for each group.

`Settings.from_config` turns a ConfigDict into settings and checks each by itself;
`mdt_jax.experiment.build` makes the objects of a run, which checks how they fit
together. An error names the setting as `config.group.name`.
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
from mdt_jax.typed_config import known_settings, parse, parse_value, to_config


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The network. None: as the preset of that name has it."""

  name: str = "MDTv2-S/2"  # a key of mdt_jax.MODELS
  input_size: int = 32  # height and width of the input: 32 for latents of 256x256
  in_channels: int = 4  # 4 for latents
  num_classes: int = 1000  # 1: unconditional
  patch_size: int | None = None
  hidden_size: int | None = None
  depth: int | None = None  # blocks, without the side block
  num_heads: int | None = None
  decode_depth: int | None = None  # blocks after the side-interpolater
  mlp_ratio: float = 4.0
  condition: str = "label"  # what the network is conditioned on
  label_dropout: float = 0.1  # share of conditions dropped; needed for guidance
  dtype: str = "float32"  # compute type: float32 or bfloat16
  remat: str = "none"  # recompute in the backward pass: none, full or dots
  unroll: int = 1  # blocks compiled in a row; -1: all, faster on CPUs
  forward_mode: bool = False  # for jax.jvp: plain products, slower gradients


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
  """What a training step descends."""

  name: str | None = None  # plain or mdt; None: mdt where a share of tokens is masked
  # Arguments of an objective of one's own.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MaskingSettings:
  """The masked pass of the objective "mdt"."""

  ratio: float = 0.3  # smallest share of tokens masked; 0: no masked pass
  width: float = 0.2  # the share is uniform in [ratio, ratio + width]; v1: 0
  num_lengths: int = 4  # numbers of kept tokens, each compiled once
  multiple: int = 8  # they are multiples of this where the sequence allows


@dataclasses.dataclass(frozen=True)
class DiffusionSettings:
  """The process; all but the first two are of the process "gaussian"."""

  process: str = "gaussian"
  # Arguments of a process of one's own.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  schedule: str = "linear"  # linear or cosine
  num_timesteps: int = 1000
  prediction: str = "epsilon"  # epsilon, x0 or v
  variance: str = "learned_range"  # learned_range, fixed_small or fixed_large
  loss_weight: str = "min_snr"  # of the squared error: none (v1) or min_snr (v2)
  min_snr_gamma: float = 5.0

  def process_arguments(self) -> dict[str, Any]:
    """Arguments of the process, for `create_process`."""
    if self.process != "gaussian":
      return dict(self.arguments)
    if self.arguments:
      raise SettingError(
        "arguments", self.arguments, "are of a process of one's own, not of gaussian"
      )
    named = dataclasses.asdict(self)
    return {name: named[name] for name in named if name not in ("process", "arguments")}


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """The optimizer; b1, b2, b3 and eps of None are the optimizer's own.

  Those of adan and adamw are those of the papers' runs.
  """

  name: str = "adan"  # adan (v2), adamw (v1, DiT), or one of optax, such as lion
  learning_rate: float = 3e-4
  schedule: str = "constant"  # constant, cosine or linear, to zero at num_steps
  warmup_steps: int = 0
  b1: float | None = None
  b2: float | None = None
  b3: float | None = None  # adan alone
  eps: float | None = None  # 1e-8 for adan and adamw
  weight_decay: float = 0.0
  clip_norm: float = 1.0  # largest global norm of the gradient; 0: no limit
  # Further arguments of the optimizer, such as {"momentum": 0.9} of sgd.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

  def check(self) -> None:
    for name in ("learning_rate", "eps"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise SettingError(name, value, "must be above 0")
    for name in ("weight_decay", "clip_norm"):
      if not getattr(self, name) >= 0:
        raise SettingError(name, getattr(self, name), "must be 0 or more")


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Examples to train on, and the autoencoder between images and latents."""

  source: str = "latents"  # latents (of mdt_jax.encode), images, npz, arrays, digits
  path: str | None = None  # folder; images: also tar files, or tfds:NAME; npz: a file
  split: str = "train"  # of a data set of TFDS
  validation: float = 0.0  # share of the examples that are held out of training
  vae: str | None = None  # folder or hub id: encodes images, decodes samples
  flip: bool = True  # mirror images at random; arrays are used as they are
  max_unreadable: int = 100  # examples that each worker leaves out before it stops
  num_workers: int = 0  # processes that read; 0: threads of this one
  num_threads: int = 8  # batches read at a time; 0: in the main thread

  def check(self) -> None:
    for name in ("max_unreadable", "num_threads", "num_workers"):
      _at_least(self, name, 0)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices along each axis of the mesh; one axis may be -1: the rest of them."""

  data: int = -1  # share the batch, hold copies of the state
  fsdp: int = 1  # share the batch and the state
  tensor: int = 1  # share heads and hidden units, of the same images


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """How the pictures of a run are drawn, and the defaults of mdt_jax.sample."""

  method: str = "ddpm"  # ddpm, ddim, euler, heun, dpm++ or dpm++sde
  num_steps: int = 250  # 10 to 30 for the last four; heun calls twice a step
  spacing: str | None = None  # uniform, log_snr, karras; None: the method's
  eta: float = 0.0  # noise of ddim: 0 none, 1 as ddpm
  cfg_scale: float = 3.8  # guidance; 1: none
  cfg_power: float = 4.0  # of the power-cosine scale; 0: constant
  cfg_channels: int = 3  # leading channels guided, as released; 0: all
  cfg_interval: tuple[float, float] = WHOLE  # guide where t / T lies in it
  clip_denoised: bool = False  # clip x0 to [-1, 1] at each step; for pixels
  ema_decay: float | None = None  # which average; None: the first

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
  """Scores of sampled images during training: docs/evaluation.md."""

  every: int = 0  # steps between them; 0: none
  metrics: str = "fid"  # by commas; fid, sfid, is, precision and recall need the
  # weights of Inception, frechet, accuracy and diversity are for small data
  num_images: int = 10_000  # sampled as config.sampling says; papers take 50,000
  batch_size: int = 64  # images at a time, over all devices
  reference: str | None = None  # .npz of images or statistics; None: the data
  inception: str | None = None  # file of weights

  @property
  def metric_names(self) -> list[str]:
    return self.metrics.split(",")

  def check(self) -> None:
    for name, least in (("every", 0), ("num_images", 2), ("batch_size", 1)):
      _at_least(self, name, least)


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run; the defaults are MDTv2-S/2 on ImageNet 256x256."""

  seed: int = 0  # of every random draw, together with the step
  num_steps: int = 400_000
  batch_size: int = 256  # images a step, over all devices
  accumulation_steps: int = 1  # parts a batch is split into, one after another
  model: ModelSettings = ModelSettings()
  objective: ObjectiveSettings = ObjectiveSettings()
  masking: MaskingSettings = MaskingSettings()
  diffusion: DiffusionSettings = DiffusionSettings()
  timestep_sampler: str = "uniform"  # uniform or loss-second-moment
  optimizer: OptimizerSettings = OptimizerSettings()
  ema_decays: tuple[float, ...] = (0.9999,)  # averages of the parameters; the first
  # is sampled
  data: DataSettings = DataSettings()
  mesh: MeshSettings = MeshSettings()
  sampling: SamplingSettings = SamplingSettings()
  eval: EvalSettings = EvalSettings()
  log_every: int = 100  # steps between log lines and TensorBoard points
  checkpoint_every: int = 10_000  # steps
  checkpoint_minutes: float = 0.0  # save as well after so many; 0: by steps alone
  checkpoints_to_keep: int = 2  # the last ones; at least 2
  checkpoint_keep_every: int = 0  # keep those of multiples of so many steps; 0: none
  save_failures: int = 5  # saves in a row that may fail before the run stops
  grace_seconds: float = 60.0  # from SIGTERM or SIGINT until the process ends
  max_skipped: int = 10  # steps of a loss or gradient not finite before the run stops
  max_rollbacks: int = 0  # or goes back to a checkpoint, without the batches since
  sample_every: int = 10_000  # steps between pictures; 0: none
  num_samples: int = 16  # images in a picture

  @classmethod
  def from_config(cls, config: ConfigDict) -> Settings:
    """Settings of a config that has all of them; each is checked by itself.

    Raises:
      SettingError: a setting is missing, unknown, of another type or out of range.
    """
    settings = parse(cls, config, "config")
    settings.check()
    return settings

  @classmethod
  def from_dict(cls, saved: Mapping[str, Any]) -> Settings:
    """Settings of a checkpoint's JSON; settings that it lacks have their defaults."""
    return cls.from_config(config_from_dict(saved))

  def to_config(self) -> ConfigDict:
    """A locked ConfigDict of these settings; their open dicts take any name."""
    config = to_config(self).lock()
    for name in ("objective", "diffusion", "optimizer"):
      group: Any = config[name]
      group.arguments.unlock()
    return config

  def to_dict(self) -> dict[str, Any]:
    """Nested dicts of these settings, as checkpoints hold them."""
    return self.to_config().to_dict()

  def check(self) -> None:
    """Raises SettingError for the first setting that cannot be used by itself."""
    with named_in_errors("config"):
      for name in ("num_steps", "batch_size", "accumulation_steps", "log_every"):
        _at_least(self, name, 1)
      _at_least(self, "checkpoint_every", 1)
      # With one alone, the next would replace it before the next is known to be whole.
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

  @property
  def sampled_decay(self) -> float:
    """The decay of the averaged parameters that are sampled."""
    chosen = self.sampling.ema_decay
    return self.ema_decays[0] if chosen is None else chosen

  def with_sampling(self, changes: Mapping[str, Any]) -> Settings:
    """These settings with others of sampling.

    Args:
      changes: settings of config.sampling, such as {"num_steps": 50}; not ema_decay,
        which belongs to the parameters.

    Raises:
      SettingError: a name or a value that cannot be used.
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
    """These settings with others of data, such as path or vae."""
    return dataclasses.replace(self, data=dataclasses.replace(self.data, **changes))

  def with_ema_decay(self, ema_decay: float) -> Settings:
    """These settings with another average to sample."""
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
      if sampling.cfg_scale != 1 and self.model.label_dropout == 0:
        raise SettingError(
          "cfg_scale",
          sampling.cfg_scale,
          "must be 1: config.model.label_dropout = 0 trains no unconditional model",
        )
      if sampling.ema_decay is not None:
        check_choice("ema_decay", sampling.ema_decay, self.ema_decays)


def config_from_dict(saved: Mapping[str, Any]) -> ConfigDict:
  """A config from a checkpoint's JSON.

  Settings that the JSON lacks have their defaults; settings that this version does not
  know, of a later version, are left out with a warning.
  """
  saved, unknown = known_settings(saved, Settings(), "config")
  if unknown:
    logger.warning("settings of another version are ignored: %s", ", ".join(unknown))
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
