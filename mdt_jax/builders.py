"""Builds single objects of a run from the settings; `experiment.Experiment` keeps them.

Each function raises SettingError, which names the setting as the user typed it, if a
setting is invalid or does not fit the other objects.
"""

from __future__ import annotations

import dataclasses

import optax

from mdt_jax.attention_choice import AUTO
from mdt_jax.buckets import is_bucket
from mdt_jax.data.conditions import with_condition
from mdt_jax.data.examples import Source
from mdt_jax.data.latent_cache import check_cache
from mdt_jax.data.latent_card import read_card
from mdt_jax.data.latents import LatentSource
from mdt_jax.data.own_source import CheckedSource
from mdt_jax.data.sources import create_source
from mdt_jax.diffusion import Process, create_process
from mdt_jax.diffusion.guidance import Guidance, TokenShares
from mdt_jax.diffusion.samplers import Sampler
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import (
  SettingError,
  check_choice,
  named_in_errors,
  renamed_in_errors,
)
from mdt_jax.models.attention import KERNELS
from mdt_jax.models.condition_registry import create_condition
from mdt_jax.models.conditions import Condition
from mdt_jax.models.registry import (
  MODELS,
  NETWORKS,
  Model,
  abstract_params,
  create_model,
)
from mdt_jax.objectives import (
  Objective,
  PlainObjective,
  UnmaskedPhase,
  create_objective,
  objective_of_class,
)
from mdt_jax.objectives.mdt import check_masking
from mdt_jax.optimizers import Schedule, create_optimizer, learning_rate_schedule
from mdt_jax.parameter_groups import frozen_paths, is_frozen, rates_of_paths
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.pretrained.zero_shards import zero_shards
from mdt_jax.setting_groups import DataSettings, SamplingSettings, split_commas
from mdt_jax.settings import Settings


def build_model(settings: Settings, *, learn_sigma: bool) -> Model:
  """Returns the network of `config.model`."""
  attributes = dataclasses.asdict(settings.model)
  if learn_sigma and MODELS.get(settings.model.name, {}).get("variant") == "SiT":
    raise SettingError(
      "config.diffusion.variance",
      settings.diffusion.variance,
      f"must be fixed_small or fixed_large, or config.diffusion.process flow or edm: "
      f"{settings.model.name} learns no variance",
    )
  if MODELS.get(settings.model.name, {}).get("variant") == "MicroDiTText":
    raise SettingError(
      "config.model.name",
      settings.model.name,
      "reads captions, which no run has; mdt_jax.create_model builds it in Python",
    )
  if settings.model.condition != "label":
    attributes["condition"] = _build_condition(settings)
  with named_in_errors("config.model"):
    check_choice("attention_kernel", settings.model.attention_kernel, (*KERNELS, AUTO))
    return create_model(**attributes, learn_sigma=learn_sigma)


def _build_condition(settings: Settings) -> Condition:
  """Returns the condition of `config.model.condition`."""
  model, chosen = settings.model, settings.condition
  names = {"condition": "config.model.condition"}
  with named_in_errors("config.condition"):
    variant = MODELS.get(model.name, {}).get("variant")
    null = NETWORKS[variant].module.null_label if variant else "learned"
    with renamed_in_errors(names):
      return create_condition(
        model.condition,
        num_classes=model.num_classes,
        dropout=model.label_dropout,
        null=null,
        **dataclasses.asdict(chosen),
      )


def build_process(settings: Settings) -> Process:
  """Returns the process of `config.diffusion`, with all times of training."""
  chosen = settings.diffusion
  with named_in_errors("config.diffusion"):
    arguments = chosen.process_arguments()
  group = "config.diffusion" + (".arguments" if chosen.process != "gaussian" else "")
  names = {"process": "config.diffusion.process"}
  with named_in_errors(group), renamed_in_errors(names):
    return create_process(chosen.process, **arguments)


def build_objective(
  settings: Settings,
  model: Model,
  process: Process,
  own: Objective | type[Objective] | None = None,
) -> Objective:
  """Returns the objective of `config.objective`, or a user-defined one."""
  if isinstance(own, Objective):
    objective = own
  else:
    objective = _build_masked(settings, model, process, own)
  start, num_steps = settings.objective.unmasked_from, settings.num_steps
  if start is None or start == num_steps:
    return objective
  name, accepted = "config.objective.unmasked_from", None
  if not 0 <= start < num_steps:
    accepted = f"must lie in [0, config.num_steps = {num_steps}]"
  elif isinstance(objective, PlainObjective):
    accepted = "must be None: the objective plain removes no tokens in any step"
  if accepted:
    raise SettingError(name, start, accepted)
  return UnmaskedPhase(objective, start)


def _build_masked(
  settings: Settings, model: Model, process: Process, own: type[Objective] | None
) -> Objective:
  """Returns the objective without its unmasked phase; see `build_objective`."""
  with named_in_errors("config"):
    sampler = TimestepSampler(settings.timestep_sampler, process)
  if own is not None:
    return objective_of_class(own, model, process, sampler)
  chosen, masking = settings.objective, settings.masking
  with named_in_errors("config.masking"):
    check_masking(**dataclasses.asdict(masking))
  name = chosen.name or _default_objective(settings, model)
  is_mdt = name == "mdt"
  if masking.groups > 1 and not is_mdt:
    raise SettingError(
      "config.masking.groups", masking.groups, f"must be 1: {name} is not mdt"
    )
  if is_mdt and chosen.arguments:
    raise SettingError(
      "config.objective.arguments",
      chosen.arguments,
      "must be empty for mdt; its settings are in config.masking",
    )
  arguments = dataclasses.asdict(masking) if is_mdt else chosen.arguments
  for reserved in ("model", "process", "timestep_sampler", "num_steps"):
    if reserved in arguments:
      raise SettingError(
        f"config.objective.arguments.{reserved}",
        arguments[reserved],
        "is no setting of an objective: the run defines it",
      )
  with (
    named_in_errors("config.masking" if is_mdt else "config.objective.arguments"),
    renamed_in_errors(
      {"objective": "config.objective.name", "process": "config.diffusion.process"}
    ),
  ):
    masked_until = chosen.unmasked_from or settings.num_steps
    return create_objective(
      name,
      model=model,
      process=process,
      timestep_sampler=sampler,
      num_steps=masked_until,
      **arguments,
    )


def _default_objective(settings: Settings, model: Model) -> str:
  """Returns the objective of a run whose settings name none."""
  masking = settings.masking
  if model.default_objective != "mdt":
    return model.default_objective
  if masking.ratio == 0 < masking.width:
    raise SettingError(
      "config.masking.width",
      masking.width,
      "needs config.objective.name = 'mdt' where config.masking.ratio = 0; with a "
      "width of 0 there is one unmasked pass",
    )
  return "mdt" if masking.ratio > 0 else "plain"


def build_learning_rate(settings: Settings) -> Schedule:
  """Returns the learning-rate schedule of `config.optimizer`."""
  chosen = settings.optimizer
  with named_in_errors("config.optimizer"):
    return learning_rate_schedule(
      chosen.schedule, chosen.learning_rate, settings.num_steps, chosen.warmup_steps
    )


def build_optimizer(
  settings: Settings, model: Model, learning_rate: Schedule, frozen: frozenset[str]
) -> optax.GradientTransformation:
  """Returns the optimizer of `config.optimizer`.

  Args:
    settings: settings of the run.
    model: the network.
    learning_rate: see `build_learning_rate`.
    frozen: paths of the parameters that are not trained, see `find_frozen`.
  """
  chosen = settings.optimizer
  with named_in_errors("config.optimizer"):
    shards = rates = None
    if chosen.clip_shards > 1:
      shards = zero_shards(model, chosen.clip_shards)
    if chosen.learning_rates:
      own = split_commas(chosen.learning_rates)
      paths = flatten(abstract_params(model))
      trained = [path for path in paths if not is_frozen(path, frozen)]
      rates = rates_of_paths("learning_rates", own, trained)
    return create_optimizer(
      chosen.name,
      learning_rate,
      b1=chosen.b1,
      b2=chosen.b2,
      b3=chosen.b3,
      eps=chosen.eps,
      weight_decay=chosen.weight_decay,
      clip_norm=chosen.clip_norm or None,
      clip_shards=shards,
      frozen=frozen,
      rates=rates,
      peak=chosen.learning_rate,
      arguments=chosen.arguments,
    )


def find_frozen(settings: Settings, model: Model) -> frozenset[str]:
  """Returns the paths of the parameters that are not trained.

  These are the ones that the network always freezes and those of
  `config.optimizer.frozen`.
  """
  chosen = split_commas(settings.optimizer.frozen)
  if not model.frozen and not chosen:
    return frozenset()
  paths = flatten(abstract_params(model))
  return frozen_paths("config.optimizer.frozen", chosen, paths, model.frozen)


def build_token_shares(sampling: SamplingSettings) -> TokenShares:
  """Returns the shares of tokens that the passes of guidance leave out."""
  return TokenShares(
    strong=sampling.strong_ratio,
    weak=sampling.weak_ratio,
    schedule=sampling.ratio_schedule,
    weak_condition=sampling.weak_condition,
  )


def build_sampler(settings: Settings, process: Process) -> Sampler:
  """Returns the sampler of `config.sampling`."""
  chosen = settings.sampling
  with named_in_errors("config.sampling"):
    return Sampler.create(
      process,
      Guidance(
        scale=chosen.cfg_scale,
        power=chosen.cfg_power,
        channels=chosen.cfg_channels or None,
        interval=chosen.cfg_interval,
        num_timesteps=process.end_network_time,
        clean_time=process.clean_network_time,
        tokens=build_token_shares(chosen),
      ),
      method=chosen.method,
      num_steps=chosen.num_steps,
      spacing=chosen.spacing,
      eta=chosen.eta,
      clip_denoised=chosen.clip_denoised,
      arguments=chosen.arguments,
    )


def open_examples(
  data: DataSettings,
  model: Model,
  image_shape: tuple[int, int, int],
  autoencoder: Autoencoder | None,
  own: Source | None = None,
) -> Source:
  """Opens all labelled examples of a run, for training and validation.

  Args:
    data: `config.data`.
    model: the network.
    image_shape: shape (H, W, C) of the images, or latents, in the data.
    autoencoder: the autoencoder of the run, whose scale latents must have.
    own: a user-defined source, used in place of that of the settings.
  """
  if own is not None:
    source = CheckedSource(own, image_shape)
  else:
    if data.source == "latents" and data.path and is_bucket(data.path):
      # The set is copied from the bucket only if it fits; the copy takes minutes.
      check_cache(data.path, data.cache)
      card = read_card(data.path)
      _check_num_classes(model, len(card["classes"]))
      if autoencoder is not None:
        autoencoder.check_scale(data.vae, card)
    if data.flip and data.source == "relations":
      accepted = "must be False: mirrored images do not obey the relations"
      raise SettingError("config.data.flip", data.flip, accepted)
    source = create_source(
      data.source,
      path=data.path,
      split=data.split,
      image_size=image_shape[:2],
      channels=image_shape[2],
      max_unreadable=data.max_unreadable,
      image_bits=data.image_bits,
      cache=data.cache,
      arguments=data.arguments,
    )
  latents = source if own is None else own
  if isinstance(latents, LatentSource) and autoencoder is not None:
    autoencoder.check_scale(data.vae, latents.card)
  _check_num_classes(model, source.num_classes)
  return with_condition(source, model.conditioning)


def _check_num_classes(model: Model, num_classes: int) -> None:
  """Raises SettingError if the data has more classes than the network."""
  if num_classes > model.num_classes:
    raise SettingError(
      "config.model.num_classes",
      model.num_classes,
      f"must be at least {num_classes}: the data has labels 0 … {num_classes - 1}",
    )
