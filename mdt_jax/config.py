"""Every setting of a run, its default, and the check of all of them.

`default_config` is the documentation of the settings; files in configs/ change what
their run needs, and `--config.name=value` on the command line has the last word.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mdt_jax import factories
from mdt_jax.atomic import write_json
from mdt_jax.diffusion.guidance import WHOLE
from mdt_jax.diffusion.samplers import METHODS
from mdt_jax.diffusion.schedules import SPACINGS
from mdt_jax.errors import SettingError, check_choice, named_in_errors
from mdt_jax.evaluation.metrics import check_metrics
from mdt_jax.sharding import mesh_shape


def default_config() -> ConfigDict:
  """The settings of MDTv2-S/2 on ImageNet 256x256; a field may not be added later."""
  c = ConfigDict()
  c.seed = 0  # of every random draw, together with the step
  c.num_steps = 400_000
  c.batch_size = 256  # images a step, over all devices
  c.accumulation_steps = 1  # parts a batch is split into, one after another

  c.model = ConfigDict()
  c.model.name = "MDTv2-S/2"  # a key of mdt_jax.MODELS; None below: as the preset
  c.model.input_size = 32  # height and width of the input: 32 for latents of 256x256
  c.model.in_channels = 4  # 4 for latents
  c.model.num_classes = 1000  # 1: unconditional
  c.model.patch_size = placeholder(int)
  c.model.hidden_size = placeholder(int)
  c.model.depth = placeholder(int)  # blocks, without the side block
  c.model.num_heads = placeholder(int)
  c.model.decode_depth = placeholder(int)  # blocks after the side-interpolater
  c.model.mlp_ratio = 4.0
  c.model.label_dropout = 0.1  # needed for guidance
  c.model.dtype = "float32"  # compute type: float32 or bfloat16
  c.model.remat = "none"  # recompute in the backward pass: none, full or dots
  c.model.unroll = 1  # blocks compiled in a row; -1: all, faster on CPUs

  c.masking = ConfigDict()
  c.masking.ratio = 0.3  # smallest share of tokens masked; 0: no masked pass
  c.masking.width = 0.2  # the share is uniform in [ratio, ratio + width]; v1: 0
  c.masking.num_lengths = 4  # numbers of kept tokens, each compiled once
  c.masking.multiple = 8  # they are multiples of this where the sequence allows

  c.diffusion = ConfigDict()
  c.diffusion.schedule = "linear"  # linear or cosine
  c.diffusion.num_timesteps = 1000
  c.diffusion.prediction = "epsilon"  # epsilon, x0 or v
  c.diffusion.variance = "learned_range"  # learned_range, fixed_small, fixed_large
  c.diffusion.loss_weight = "min_snr"  # of the squared error: none (v1) or min_snr (v2)
  c.diffusion.min_snr_gamma = 5.0
  c.timestep_sampler = "uniform"  # uniform or loss-second-moment

  c.optimizer = ConfigDict()
  c.optimizer.name = "adan"  # adan (v2) or adamw (v1, DiT)
  c.optimizer.learning_rate = 3e-4
  c.optimizer.schedule = "constant"  # constant, cosine or linear, to zero at num_steps
  c.optimizer.warmup_steps = 0
  c.optimizer.b1 = placeholder(float)  # None: those of the paper's runs
  c.optimizer.b2 = placeholder(float)
  c.optimizer.b3 = placeholder(float)  # adan alone
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0: no limit
  c.ema_decays = (0.9999,)  # averages of the parameters; the first is sampled

  c.data = ConfigDict()
  c.data.source = "latents"  # latents (of mdt_jax.encode), images, arrays, or digits
  c.data.path = placeholder(str)  # folder; images: also tar files, or tfds:NAME
  c.data.split = "train"  # of a data set of TFDS
  c.data.validation = 0.0  # share of the examples that are held out of training
  c.data.vae = placeholder(str)  # folder or hub id: encodes images, decodes samples
  c.data.flip = True  # mirror images at random; arrays are used as they stand
  c.data.max_unreadable = 100  # examples left out, by each worker, before it stops
  c.data.num_workers = 0  # processes that read; 0: threads of this one
  c.data.num_threads = 8  # batches read at a time; 0: in the main thread

  c.mesh = ConfigDict()  # devices along each axis; one axis may be -1: what is left
  c.mesh.data = -1  # share the batch, hold copies of the state
  c.mesh.fsdp = 1  # share the batch and the state
  c.mesh.tensor = 1  # share heads and hidden units, of the same images

  c.sampling = ConfigDict()  # of the pictures, and the defaults of mdt_jax.sample
  c.sampling.method = "ddpm"  # ddpm, ddim, euler, heun, dpm++ or dpm++sde
  c.sampling.num_steps = 250  # 10 to 30 for the last four; heun calls twice a step
  c.sampling.spacing = placeholder(str)  # uniform, log_snr, karras; None: the method's
  c.sampling.eta = 0.0  # noise of ddim: 0 none, 1 as ddpm
  c.sampling.cfg_scale = 3.8  # guidance; 1: none
  c.sampling.cfg_power = 4.0  # of the power-cosine scale; 0: constant
  c.sampling.cfg_channels = 3  # leading channels guided, as released; 0: all
  c.sampling.cfg_interval = WHOLE  # guide where t / T lies in it, ends included
  c.sampling.clip_denoised = False  # clip x0 to [-1, 1] at each step; for pixels
  c.sampling.ema_decay = placeholder(float)  # which average; None: the first

  c.eval = ConfigDict()  # scores of sampled images during training: docs/evaluation.md
  c.eval.every = 0  # steps between them; 0: none
  c.eval.metrics = "fid"  # by commas: fid sfid is precision recall need Inception's
  # weights; frechet accuracy diversity are for small data
  c.eval.num_images = 10_000  # sampled as config.sampling says; papers take 50,000
  c.eval.batch_size = 64  # images at a time, over all devices
  c.eval.reference = placeholder(str)  # .npz of images or statistics; None: the data
  c.eval.inception = placeholder(str)  # file of weights

  c.log_every = 100  # steps between log lines and TensorBoard points
  c.checkpoint_every = 10_000  # steps
  c.checkpoint_minutes = 0.0  # save as well when so many have passed; 0: by steps alone
  c.checkpoints_to_keep = 2  # the last ones; at least 2
  c.checkpoint_keep_every = 0  # keep those of multiples of so many steps too; 0: none
  c.save_failures = 5  # saves in a row that may fail, on a full disk, before it stops
  c.grace_seconds = 60.0  # to save in, from SIGTERM or SIGINT until the process ends
  c.max_skipped = 10  # steps with a loss or gradient not finite, before the run stops
  c.max_rollbacks = 0  # or goes back to a checkpoint, and leaves the batches since out
  c.sample_every = 10_000  # steps between pictures; 0: none
  c.num_samples = 16  # images in a picture
  return c.lock()


def check(config: ConfigDict, num_devices: int = 1) -> None:
  """Raises SettingError for the first setting that cannot be used.

  Args:
    config: as `default_config`.
    num_devices: devices of the run.
  """
  _check_fields(config, default_config(), "config")
  with named_in_errors("config"):
    for name in ("num_steps", "batch_size", "accumulation_steps", "log_every"):
      _at_least(config, name, 1)
    _at_least(config, "checkpoint_every", 1)
    # Of one alone, the next would take its place before it is known to be whole.
    _at_least(config, "checkpoints_to_keep", 2)
    for name in ("seed", "sample_every", "num_samples", "checkpoint_minutes"):
      _at_least(config, name, 0)
    for name in ("checkpoint_keep_every", "max_skipped", "max_rollbacks"):
      _at_least(config, name, 0)
    for name in ("save_failures", "grace_seconds"):
      _at_least(config, name, 1)
  if config.seed >= 2**32:
    raise SettingError("config.seed", config.seed, "must be below 2**32")
  for name in ("max_unreadable", "num_threads", "num_workers"):
    if config.data[name] < 0:
      raise SettingError(f"config.data.{name}", config.data[name], "must be at least 0")
  factories.make_model(config)
  factories.make_diffusion(config)
  factories.kept_lengths(config)
  factories.make_optimizer(config)
  factories.make_timestep_sampler(config)
  check_sampling(config)
  _check_mesh(config, num_devices)
  _check_eval(config)
  decays = config.ema_decays
  if not decays or not all(
    isinstance(decay, (int, float)) and 0 <= decay < 1 for decay in decays
  ):
    raise SettingError(
      "config.ema_decays", config.ema_decays, "must be one or more numbers in [0, 1)"
    )


def _check_fields(config: ConfigDict, default: ConfigDict, prefix: str) -> None:
  """Raises where settings are missing or unknown, of a wrong type or not finite."""
  for name in config:
    if name not in default:
      near = difflib.get_close_matches(name, default, 1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise SettingError(f"{prefix}.{name}", config[name], f"is no setting{hint}")
  for name, value in default.items():
    setting = f"{prefix}.{name}"
    if name not in config:
      raise SettingError(setting, None, "is missing, the file takes it away")
    given = config[name]
    if isinstance(value, ConfigDict):
      if not isinstance(given, ConfigDict):
        raise SettingError(setting, given, "must be a group of settings")
      _check_fields(given, value, setting)
    elif given is not None or value is not None:
      _check_type(setting, given, default.get_type(name))


def _check_type(setting: str, value: Any, accepted: type) -> None:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  is_right = is_number if accepted is float else isinstance(value, accepted)
  if not is_right or (accepted is int and isinstance(value, bool)):
    raise SettingError(setting, value, f"must be of type {accepted.__name__}")
  if is_number and not math.isfinite(value):
    raise SettingError(setting, value, "must be finite")


def write(config: ConfigDict, workdir: Path) -> None:
  """Writes config.json, to be looked at; checkpoints hold the config they go by."""
  write_json(workdir / "config.json", config.to_dict())


def check_sampling(config: ConfigDict) -> None:
  """Raises SettingError for the first of config.sampling that cannot be used."""
  sampling = config.sampling
  _check_fields(sampling, default_config().sampling, "config.sampling")
  with named_in_errors("config.sampling"):
    check_choice("method", sampling.method, METHODS)
    if not 1 <= sampling.num_steps <= config.diffusion.num_timesteps:
      raise SettingError(
        "num_steps",
        sampling.num_steps,
        f"must lie in [1, config.diffusion.num_timesteps = "
        f"{config.diffusion.num_timesteps}]",
      )
    if sampling.spacing is not None:
      check_choice("spacing", sampling.spacing, SPACINGS)
    if not 0 <= sampling.eta <= 1:
      raise SettingError("eta", sampling.eta, "must lie in [0, 1]")
    for name in ("cfg_scale", "cfg_power", "cfg_channels"):
      if not sampling[name] >= 0:
        raise SettingError(name, sampling[name], "must be 0 or more")
    interval = sampling.cfg_interval
    is_pair = len(interval) == 2 and all(isinstance(x, (int, float)) for x in interval)
    if not (is_pair and 0 <= interval[0] <= interval[1] <= 1):
      raise SettingError(
        "cfg_interval", tuple(interval), "must be (low, high), 0 <= low <= high <= 1"
      )
    if sampling.cfg_scale != 1 and config.model.label_dropout == 0:
      raise SettingError(
        "cfg_scale",
        sampling.cfg_scale,
        "must be 1: config.model.label_dropout = 0 trains no unconditional model",
      )
    if sampling.ema_decay is not None:
      check_choice("ema_decay", sampling.ema_decay, config.ema_decays)


def _check_mesh(config: ConfigDict, num_devices: int) -> None:
  mesh = config.mesh
  data, fsdp, tensor = mesh_shape((mesh.data, mesh.fsdp, mesh.tensor), num_devices)
  parts = data * fsdp * config.accumulation_steps
  if config.batch_size % parts:
    raise SettingError(
      "config.batch_size",
      config.batch_size,
      f"must be divisible by {data * fsdp} devices that share a batch x "
      f"config.accumulation_steps = {config.accumulation_steps}, so by {parts}",
    )
  model = factories.make_model(config)
  if model.hidden_size % fsdp:
    raise SettingError(
      "config.mesh.fsdp", fsdp, f"must divide the width of {model.hidden_size}"
    )
  hidden = int(model.hidden_size * model.mlp_ratio)
  if model.num_heads % tensor or hidden % tensor:
    raise SettingError(
      "config.mesh.tensor",
      tensor,
      f"must divide the {model.num_heads} heads and the {hidden} hidden units",
    )


def _check_eval(config: ConfigDict) -> None:
  with named_in_errors("config.eval"):
    for name, least in (("every", 0), ("num_images", 2), ("batch_size", 1)):
      _at_least(config.eval, name, least)
    if config.eval.every:
      has_inception = config.eval.inception is not None
      check_metrics("metrics", factories.eval_metrics(config), has_inception)


def _at_least(config: ConfigDict, name: str, least: int) -> None:
  if config[name] < least:
    raise SettingError(name, config[name], f"must be at least {least}")
