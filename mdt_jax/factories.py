"""What the settings of a run make: network, process, optimizer, data, autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax.sharding import Sharding
from ml_collections import ConfigDict

from mdt_jax.data.sources import Source, Subset, create_source, split_indices
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.solvers import SOLVERS, SPACING_OF
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import SettingError, named_in_errors
from mdt_jax.models.masking import KeptLengths
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import DTYPES, create_model
from mdt_jax.optimizers import create_optimizer, learning_rate_schedule

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

MAX_MASK_RATIO = 0.8


def make_model(config: ConfigDict) -> MDT:
  """The network of a run."""
  with named_in_errors("config.model"):
    return create_model(
      **config.model, learn_sigma=config.diffusion.variance == "learned_range"
    )


def make_diffusion(config: ConfigDict, spacing: str = "") -> GaussianDiffusion:
  """The process of a run, respaced for sampling where `spacing` is given."""
  with named_in_errors("config.diffusion"):
    return GaussianDiffusion.create(**config.diffusion, spacing=spacing)


def make_sampled_diffusion(config: ConfigDict) -> GaussianDiffusion:
  """The process of a run, with the steps that config.sampling takes."""
  sampling = config.sampling
  is_solver = sampling.method in SOLVERS
  spacing = sampling.spacing or SPACING_OF.get(sampling.method, "uniform")
  if spacing == "uniform" and not is_solver:
    spacing = ""  # as released
  return make_diffusion(config, f"{spacing}{sampling.num_steps}")


def make_timestep_sampler(config: ConfigDict) -> TimestepSampler:
  with named_in_errors("config"):
    return TimestepSampler(config.timestep_sampler, config.diffusion.num_timesteps)


def make_optimizer(config: ConfigDict) -> tuple[Any, Any]:
  """The optax transformation of a run, and its learning rate by step."""
  settings = config.optimizer.to_dict()
  with named_in_errors("config.optimizer"):
    for name in ("learning_rate", "eps"):
      if not settings[name] > 0:
        raise SettingError(name, settings[name], "must be above 0")
    for name in ("weight_decay", "clip_norm"):
      if not settings[name] >= 0:
        raise SettingError(name, settings[name], "must be 0 or more")
    learning_rate = learning_rate_schedule(
      settings.pop("schedule"),
      settings.pop("learning_rate"),
      config.num_steps,
      settings.pop("warmup_steps"),
    )
    settings["clip_norm"] = settings["clip_norm"] or None
    optimizer = create_optimizer(
      **settings, learning_rate=learning_rate, frozen=make_model(config).frozen
    )
  return optimizer, learning_rate


def kept_lengths(config: ConfigDict) -> KeptLengths | None:
  """The numbers of kept tokens of the masked pass; None where there is none."""
  masking = config.masking
  if not 0 <= masking.ratio <= MAX_MASK_RATIO:
    raise SettingError(
      "config.masking.ratio", masking.ratio, f"must lie in [0, {MAX_MASK_RATIO}]"
    )
  if not 0 <= masking.width <= 1 or masking.ratio + masking.width > MAX_MASK_RATIO:
    raise SettingError(
      "config.masking.width",
      masking.width,
      f"must lie in [0, {MAX_MASK_RATIO} - ratio = {MAX_MASK_RATIO - masking.ratio:g}]",
    )
  for name in ("num_lengths", "multiple"):
    if masking[name] < 1:
      raise SettingError(f"config.masking.{name}", masking[name], "must be at least 1")
  model = make_model(config)
  if not model.takes_mask or masking.ratio == 0:
    return None
  lengths = KeptLengths.create(model.num_tokens, **masking)
  if lengths.lengths[0] < 1:
    raise SettingError(
      "config.masking.ratio",
      masking.ratio,
      f"leaves none of the {model.num_tokens} tokens to see",
    )
  return lengths


def make_autoencoder(
  config: ConfigDict, sharding: Sharding | None = None
) -> Autoencoder | None:
  """The autoencoder of a run, if it has one."""
  if config.data.vae is None:
    return None
  from mdt_jax.pretrained.autoencoder import Autoencoder

  autoencoder = Autoencoder.load(
    config.data.vae, DTYPES[config.model.dtype], sharding=sharding
  )
  if autoencoder.model.latent_channels != config.model.in_channels:
    raise SettingError(
      "config.model.in_channels",
      config.model.in_channels,
      f"must be {autoencoder.model.latent_channels}, the latent channels of "
      f"config.data.vae = {config.data.vae!r}",
    )
  return autoencoder


def make_source(
  config: ConfigDict, autoencoder: Autoencoder | None = None, *, held_out: bool = False
) -> Source:
  """The labelled examples of a run.

  Args:
    config: see `default_config`.
    autoencoder: of `make_autoencoder`; where images are encoded it makes them larger.
    held_out: the examples for validation, not those for training.
  """
  image_size, channels = config.model.input_size, config.model.in_channels
  if encodes_images(config):
    image_size, channels = image_size * autoencoder.model.downsampling, 3
  source = create_source(
    config.data.source,
    path=config.data.path,
    split=config.data.split,
    image_size=image_size,
    channels=channels,
    max_unreadable=config.data.max_unreadable,
  )
  if autoencoder is not None and config.data.source == "latents":
    _check_scale(config, autoencoder, source.card)
  if source.num_classes > config.model.num_classes:
    raise SettingError(
      "config.model.num_classes",
      config.model.num_classes,
      f"the data has labels 0 … {source.num_classes - 1}: "
      f"must be at least {source.num_classes}",
    )
  share = config.data.validation
  if not 0 <= share <= 0.5:
    raise SettingError("config.data.validation", share, "must lie in [0, 0.5]")
  training, validation = split_indices(len(source), share)
  if held_out and not len(validation):
    raise SettingError("config.data.validation", share, "holds no example out")
  return Subset(source, validation if held_out else training) if share else source


def _check_scale(
  config: ConfigDict, autoencoder: Autoencoder, card: dict[str, Any]
) -> None:
  """Raises where latents would be decoded at another scale than they are stored in."""
  for name in ("scaling_factor", "shift_factor"):
    own, stored = getattr(autoencoder.model, name), card[name]
    if own != stored:
      raise SettingError(
        "config.data.vae",
        config.data.vae,
        f"has {name} = {own}, where the latents were made with {stored} "
        f"(by {card['vae']})",
      )


def encodes_images(config: ConfigDict) -> bool:
  """Whether images are encoded on the device, at each visit."""
  return config.data.source == "images" and config.data.vae is not None


def holds_pixels(config: ConfigDict) -> bool:
  """Whether the network works on pixels, and not on latents."""
  return config.data.source in ("digits", "images") and config.data.vae is None


def image_shape(
  config: ConfigDict, autoencoder: Autoencoder | None = None
) -> tuple[int, int, int]:
  """(H, W, C) of what the network draws, or of what an autoencoder makes of it."""
  size, channels = config.model.input_size, config.model.in_channels
  if autoencoder is not None:
    size, channels = size * autoencoder.model.downsampling, 3
  return size, size, channels


def sampled_decay(config: ConfigDict, given: float | None = None) -> float:
  """The decay of the averaged parameters that are sampled; `given` goes first."""
  for decay in (given, config.sampling.ema_decay):
    if decay is not None:
      return decay
  return config.ema_decays[0]


def eval_metrics(config: ConfigDict) -> list[str]:
  """The scores that are taken during training."""
  return config.eval.metrics.split(",")
