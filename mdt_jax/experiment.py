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
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mdt_jax import sharding
from mdt_jax.data.examples import Source, Subset, split_indices
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
from mdt_jax.models.registry import DTYPES, Model, create_model
from mdt_jax.objectives import Objective, create_objective
from mdt_jax.objectives.mdt import check_masking
from mdt_jax.optimizers import Schedule, create_optimizer, learning_rate_schedule
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.settings import Settings
from mdt_jax.types import Batch


def build(
  config: ConfigDict | Settings, devices: Sequence[Any] | None = None
) -> Experiment:
  """Builds the objects of a run and checks its settings, also against each other.

  The data and the autoencoder are opened when they are first asked for. Training checks
  `config.eval`, see `evaluation.evaluator.check_eval`.

  Args:
    config: see `mdt_jax.config.default_config`.
    devices: of the run; all of all processes unless given.

  Raises:
    SettingError: for the first setting that cannot be used.
  """
  if isinstance(config, ConfigDict):
    config = Settings.from_config(config)
  experiment = Experiment(config, devices)
  experiment.check()
  return experiment


class Experiment:
  """The objects of a run; each is built once, when it is first asked for.

  Args:
    settings: of the run.
    devices: of the run; all of all processes unless given.
  """

  def __init__(self, settings: Settings, devices: Sequence[Any] | None = None):
    self.settings = settings
    self._devices = devices

  def check(self) -> None:
    """Raises SettingError for settings that do not fit together."""
    _ = self.model, self.process, self.objective, self.optimizer
    self._check_mesh()

  def open(self) -> None:
    """Opens the data, the autoencoder and the mesh now.

    Raises:
      SettingError: as `source` and `autoencoder`.
    """
    _ = self.mesh, self.autoencoder, self.source

  @functools.cached_property
  def model(self) -> Model:
    """The network."""
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
    is_own = chosen.process != "gaussian"
    with (
      named_in_errors("config.diffusion.arguments" if is_own else "config.diffusion"),
      renamed_in_errors({"process": "config.diffusion.process"}),
    ):
      return create_process(chosen.process, **arguments)

  @functools.cached_property
  def objective(self) -> Objective:
    """The draws and the loss of a training step."""
    chosen, masking = self.settings.objective, self.settings.masking
    with named_in_errors("config"):
      sampler = TimestepSampler(self.settings.timestep_sampler, self.process)
    with named_in_errors("config.masking"):
      check_masking(**dataclasses.asdict(masking))
    name = chosen.name
    if name is None:
      name = "mdt" if self.model.takes_mask and masking.ratio > 0 else "plain"
    is_mdt = name == "mdt"
    arguments = chosen.arguments
    if is_mdt and arguments:
      raise SettingError(
        "config.objective.arguments",
        arguments,
        "are of an objective of one's own; those of mdt are config.masking",
      )
    if is_mdt:
      arguments = dataclasses.asdict(masking)
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
  def learning_rate(self) -> Schedule:
    """Learning rate by step."""
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
    """The labelled examples that are trained on."""
    return self._part_of_examples(0)

  @functools.cached_property
  def held_out(self) -> Source:
    """The labelled examples that are held out of training."""
    return self._part_of_examples(1)

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
    vae, channels = self.settings.data.vae, self.settings.model.in_channels
    if vae is None:
      return None
    with renamed_in_errors({"vae": "config.data.vae"}):
      autoencoder = Autoencoder.load(
        vae, DTYPES[self.settings.model.dtype], sharding=placement
      )
    if autoencoder.model.latent_channels != channels:
      raise SettingError(
        "config.model.in_channels",
        channels,
        f"must be {autoencoder.model.latent_channels}, the latent channels of "
        f"config.data.vae = {vae!r}",
      )
    return autoencoder

  def _sharing(self, settings: Settings) -> Experiment:
    """An experiment of other settings that shares what they do not change."""
    other = Experiment(settings, self._devices)
    other.__dict__["model"] = self.model
    other.__dict__["process"] = self.process
    if settings.data == self.settings.data and "autoencoder" in self.__dict__:
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
    data, model = self.settings.data, self.settings.model
    image_size, channels = model.input_size, model.in_channels
    if self.encodes_images:
      assert self.autoencoder is not None
      image_size, channels = image_size * self.autoencoder.model.downsampling, 3
    source = create_source(
      data.source,
      path=data.path,
      split=data.split,
      image_size=image_size,
      channels=channels,
      max_unreadable=data.max_unreadable,
    )
    if isinstance(source, LatentSource) and self.autoencoder is not None:
      self._check_scale(source, self.autoencoder)
    if source.num_classes > model.num_classes:
      raise SettingError(
        "config.model.num_classes",
        model.num_classes,
        f"the data has labels 0 … {source.num_classes - 1}: "
        f"must be at least {source.num_classes}",
      )
    return source

  def _check_scale(self, source: LatentSource, autoencoder: Autoencoder) -> None:
    """Raises where latents are stored at another scale than they are decoded from."""
    for name in ("scaling_factor", "shift_factor"):
      own, stored = getattr(autoencoder.model, name), source.card[name]
      if own != stored:
        raise SettingError(
          "config.data.vae",
          self.settings.data.vae,
          f"has {name} = {own}, where the latents were made with {stored} "
          f"(by {source.card['vae']})",
        )

  def _check_mesh(self) -> None:
    """Raises where the devices cannot share the batch or the network."""
    settings, model = self.settings, self.model
    num_devices = jax.device_count() if self._devices is None else len(self._devices)
    mesh = dataclasses.astuple(settings.mesh)
    data, fsdp, tensor = sharding.mesh_shape(mesh, num_devices)
    parts = data * fsdp * settings.accumulation_steps
    if settings.batch_size % parts:
      raise SettingError(
        "config.batch_size",
        settings.batch_size,
        f"must be divisible by {data * fsdp} devices that share a batch x "
        f"config.accumulation_steps = {settings.accumulation_steps}, so by {parts}",
      )
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
