"""From settings to the objects of a run, each of which is built once.

  config (ConfigDict) -> settings.Settings -> build -> Experiment

Everything else takes the objects that it uses, and never a config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import sharding
from mdt_jax.data.examples import Source, Subset, check_source, split_indices
from mdt_jax.data.latents import LatentSource
from mdt_jax.data.sources import SOURCES, create_source
from mdt_jax.diffusion import Process, create_process
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.samplers import Sampler
from mdt_jax.diffusion.timestep_samplers import TimestepSampler
from mdt_jax.errors import (
  SettingError,
  check_choice,
  named_in_errors,
  renamed_in_errors,
)
from mdt_jax.models.network import check_network
from mdt_jax.models.registry import DTYPES, Model, create_model
from mdt_jax.objectives import Objective, create_objective, objective_of_class
from mdt_jax.objectives.mdt import check_masking
from mdt_jax.optimizers import (
  Schedule,
  create_optimizer,
  learning_rate_schedule,
  without_frozen,
)
from mdt_jax.own_parts import OwnParts
from mdt_jax.pretrained.autoencoder import Autoencoder, load_autoencoder
from mdt_jax.settings import Settings
from mdt_jax.types import Batch


def build(
  config: ConfigDict | Settings,
  devices: Sequence[Any] | None = None,
  *,
  model: Model | None = None,
  objective: Objective | type[Objective] | None = None,
  optimizer: optax.GradientTransformation | None = None,
  source: Source | None = None,
) -> Experiment:
  """Builds the objects of a run and checks its settings, also against each other.

  The data and the autoencoder are opened when they are first asked for. Training checks
  `config.eval`, see `evaluation.evaluator.check_eval`.

  Args:
    config: see `mdt_jax.config.default_config`.
    devices: of the run; all of all processes unless given.
    model, objective, optimizer, source: parts of your own, instead of those of the
      config; see `OwnParts`.

  Raises:
    SettingError: for the first setting that cannot be used, or a part of your own that
      does not fit.
  """
  if isinstance(config, ConfigDict):
    config = Settings.from_config(config)
  own = OwnParts(model, objective, optimizer, source)
  experiment = Experiment(config, devices, own)
  experiment.check()
  return experiment


class Experiment:
  """The objects of a run; each is built once, when it is first asked for.

  Args:
    settings: of the run.
    devices: of the run; all of all processes unless given.
    own: parts of your own.
  """

  def __init__(
    self,
    settings: Settings,
    devices: Sequence[Any] | None = None,
    own: OwnParts | None = None,
  ):
    self._own = own or OwnParts()
    self._devices = devices
    self.settings = settings
    if (source := self._own.source) is not None:
      # The checkpoint tells whoever samples from it whether the run had pixels.
      kind = "images" if _has_pixels(source) else "arrays"
      self.settings = settings.with_data(source=kind, path=f"<{type(source).__name__}>")

  def __repr__(self) -> str:
    return f"Experiment({self.model_name})"

  def check(self) -> None:
    """Raises SettingError for settings that do not fit together."""
    own = self._own.optimizer
    if own is not None and not (hasattr(own, "init") and hasattr(own, "update")):
      raise SettingError(
        "optimizer", own, "must be an optax.GradientTransformation: (init, update)"
      )
    _ = self.model, self.process, self.objective, self.optimizer
    scale = self.settings.sampling.cfg_scale
    if scale != 1 and self.model.conditioning.dropout == 0:
      raise SettingError(
        "config.sampling.cfg_scale", scale, "must be 1: the network drops no condition"
      )
    num_devices = jax.device_count() if self._devices is None else len(self._devices)
    sharding.check_mesh(
      dataclasses.astuple(self.settings.mesh),
      num_devices,
      self.model,
      batch_size=self.settings.batch_size,
      accumulation_steps=self.settings.accumulation_steps,
    )

  def open(self) -> None:
    """Opens the data, the autoencoder and the mesh now.

    Raises:
      SettingError: as `source` and `autoencoder`.
    """
    _ = self.mesh, self.autoencoder, self.source

  @functools.cached_property
  def model(self) -> Model:
    """The network."""
    if self._own.model is not None:
      check_network(self._own.model)
      return self._own.model
    with named_in_errors("config.model"):
      return create_model(
        **dataclasses.asdict(self.settings.model),
        learn_sigma=self.process.learns_variance,
      )

  @functools.cached_property
  def process(self) -> Process:
    """The process that is trained, on all of its times."""
    chosen = self.settings.diffusion
    with named_in_errors("config.diffusion"):
      arguments = chosen.process_arguments()
    group = "config.diffusion" + (".arguments" if chosen.process != "gaussian" else "")
    names = {"process": "config.diffusion.process"}
    with named_in_errors(group), renamed_in_errors(names):
      return create_process(chosen.process, **arguments)

  @functools.cached_property
  def objective(self) -> Objective:
    """The draws and the loss of a training step."""
    if isinstance(self._own.objective, Objective):
      return self._own.objective
    chosen, masking = self.settings.objective, self.settings.masking
    with named_in_errors("config"):
      sampler = TimestepSampler(self.settings.timestep_sampler, self.process)
    if self._own.objective is not None:
      return objective_of_class(self._own.objective, self.model, self.process, sampler)
    with named_in_errors("config.masking"):
      check_masking(**dataclasses.asdict(masking))
    name = chosen.name
    if name is None:
      name = "mdt" if self.model.takes_mask and masking.ratio > 0 else "plain"
    is_mdt = name == "mdt"
    if is_mdt and chosen.arguments:
      raise SettingError(
        "config.objective.arguments",
        chosen.arguments,
        "are of an objective of one's own; those of mdt are config.masking",
      )
    arguments = dataclasses.asdict(masking) if is_mdt else chosen.arguments
    with (
      named_in_errors("config.masking" if is_mdt else "config.objective.arguments"),
      renamed_in_errors({"objective": "config.objective.name"}),
    ):
      return create_objective(
        name,
        model=self.model,
        process=self.process,
        timestep_sampler=sampler,
        **arguments,
      )

  @functools.cached_property
  def learning_rate(self) -> Schedule | None:
    """Learning rate by step; None for an optimizer of your own."""
    if self._own.optimizer is not None:
      return None
    chosen = self.settings.optimizer
    with named_in_errors("config.optimizer"):
      return learning_rate_schedule(
        chosen.schedule,
        chosen.learning_rate,
        self.settings.num_steps,
        chosen.warmup_steps,
      )

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """Gradients to updates of the parameters."""
    if self._own.optimizer is not None:
      return without_frozen(self._own.optimizer, self.model.frozen)
    assert self.learning_rate is not None
    chosen = self.settings.optimizer
    with named_in_errors("config.optimizer"):
      return create_optimizer(
        chosen.name,
        self.learning_rate,
        b1=chosen.b1,
        b2=chosen.b2,
        b3=chosen.b3,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        clip_norm=chosen.clip_norm or None,
        frozen=self.model.frozen,
        arguments=chosen.arguments,
      )

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The devices of the run."""
    return sharding.make_mesh(
      **dataclasses.asdict(self.settings.mesh), devices=self._devices
    )

  @functools.cached_property
  def sampler(self) -> Sampler:
    """How the run draws latents: `config.sampling`."""
    chosen = self.settings.sampling
    with named_in_errors("config.sampling"):
      return Sampler.create(
        self.process,
        Guidance(
          scale=chosen.cfg_scale,
          power=chosen.cfg_power,
          channels=chosen.cfg_channels or None,
          interval=chosen.cfg_interval,
          num_timesteps=self.process.end_network_time,
        ),
        method=chosen.method,
        num_steps=chosen.num_steps,
        spacing=chosen.spacing,
        eta=chosen.eta,
        clip_denoised=chosen.clip_denoised,
      )

  @functools.cached_property
  def autoencoder(self) -> Autoencoder | None:
    """Images to latents and back, on every device of the mesh; None without one."""
    if self.settings.data.vae is None:
      return None
    return self.load_autoencoder(sharding.replicated(self.mesh))

  @functools.cached_property
  def source(self) -> Source:
    """The labelled examples of training."""
    return self._part_of_examples(0)

  @functools.cached_property
  def held_out(self) -> Source:
    """The labelled examples that are held out; needs `config.data.validation`."""
    return self._part_of_examples(1)

  @property
  def model_name(self) -> str:
    """Name of the network, for people."""
    if self._own.model is not None:
      return type(self._own.model).__name__
    return self.settings.model.name

  @property
  def encodes_images(self) -> bool:
    """Whether images are encoded on the devices, at each visit."""
    data = self.settings.data
    return data.source in ("images", "npz") and data.vae is not None

  @property
  def holds_pixels(self) -> bool:
    """Whether the network works on pixels, and not on latents."""
    data = self.settings.data
    check_choice("config.data.source", data.source, SOURCES)
    return SOURCES[data.source].pixels and data.vae is None

  def encode(self, batch: Batch) -> Batch:
    """A batch with the moments of its images, where the run encodes images."""
    if not self.encodes_images or self.autoencoder is None:
      return batch
    encoded = dict(batch)
    encoded["moments"] = self.autoencoder.moments(encoded.pop("image"))
    return encoded

  def with_sampling(self, changes: Mapping[str, Any]) -> Experiment:
    """The same objects, with another sampler; see `Settings.with_sampling`."""
    return self._sharing(self.settings.with_sampling(changes))

  def with_data(self, **changes: Any) -> Experiment:
    """The same network and process, with other data; see `Settings.with_data`."""
    return self._sharing(self.settings.with_data(**changes))

  def with_vae(self, vae: str | None) -> Experiment:
    """The same network and process, with another autoencoder.

    Args:
      vae: folder or hub id; None keeps the autoencoder of the run.

    Raises:
      SettingError: the network draws pixels, which need no autoencoder.
    """
    if vae is not None and self.holds_pixels:
      raise SettingError("vae", vae, "must be left out: this model draws pixels")
    return self.with_data(vae=vae) if vae else self

  def load_autoencoder(
    self, placement: jax.sharding.Sharding | None = None
  ) -> Autoencoder | None:
    """The autoencoder of the settings, with its parameters laid out as asked.

    Raises:
      SettingError: there is none of that name, or its latents have other channels.
    """
    vae = self.settings.data.vae
    if vae is None:
      return None
    dtype = DTYPES[self.settings.model.dtype]
    return load_autoencoder(vae, dtype, self.model.in_channels, placement)

  def _sharing(self, settings: Settings) -> Experiment:
    """An experiment of other settings that shares what they do not change."""
    keeps_data = settings.data == self.settings.data
    own = self._own if keeps_data else dataclasses.replace(self._own, source=None)
    other = Experiment(settings, self._devices, own)
    other.__dict__["model"] = self.model
    other.__dict__["process"] = self.process
    if keeps_data and "autoencoder" in self.__dict__:
      other.__dict__["autoencoder"] = self.autoencoder
    return other

  def _part_of_examples(self, part: int) -> Source:
    """The examples for training (0) or those that are held out of it (1)."""
    share, examples = self.settings.data.validation, self._examples
    if not 0 <= share <= 0.5:
      raise SettingError("config.data.validation", share, "must lie in [0, 0.5]")
    indices = split_indices(len(examples), share)[part]
    if not len(indices):
      raise SettingError("config.data.validation", share, "holds no example out")
    return Subset(examples, indices) if share else examples

  @functools.cached_property
  def _examples(self) -> Source:
    """All labelled examples of the data."""
    data, model = self.settings.data, self.model
    source, image_shape = self._own.source, self._image_shape()
    if source is not None:
      check_source(source, image_shape)
    else:
      source = create_source(
        data.source,
        path=data.path,
        split=data.split,
        image_size=image_shape[0],
        channels=image_shape[2],
        max_unreadable=data.max_unreadable,
      )
    if isinstance(source, LatentSource) and self.autoencoder is not None:
      self.autoencoder.check_scale(data.vae, source.card)
    if source.num_classes > model.num_classes:
      raise SettingError(
        "config.model.num_classes",
        model.num_classes,
        f"the data has labels 0 … {source.num_classes - 1}: "
        f"must be at least {source.num_classes}",
      )
    return source

  def _image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the images that the data has to hold."""
    side, channels = self.model.input_size, self.model.in_channels
    if self.encodes_images and self.autoencoder is not None:
      side, channels = side * self.autoencoder.model.downsampling, 3
    return side, side, channels


def _has_pixels(source: Source) -> bool:
  """Whether the examples of a source hold uint8 images."""
  example = source[0] if len(source) else {}
  return getattr(example.get("image"), "dtype", None) == np.uint8
