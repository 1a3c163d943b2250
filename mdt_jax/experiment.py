"""Builds the objects of a run, such as network, process and data, from the settings.

  config (ConfigDict) -> settings.Settings -> build -> Experiment

Only this module and `builders` turn settings into objects. Other modules receive these
objects.
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

from mdt_jax import builders, sharding
from mdt_jax.attention_choice import AUTO, FASTEST, kernel_problem
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.examples import Source, Subset, split_indices
from mdt_jax.data.sources import SOURCES
from mdt_jax.diffusion import Process
from mdt_jax.diffusion.continuous import ContinuousProcess
from mdt_jax.diffusion.samplers import Sampler
from mdt_jax.diffusion.time_solvers import TIME_SOLVERS
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.logs import logger
from mdt_jax.models.network import check_network
from mdt_jax.models.registry import DTYPES, Model
from mdt_jax.objectives import Objective
from mdt_jax.optimizers import Schedule
from mdt_jax.own_parts import OwnParts
from mdt_jax.parameter_groups import without_frozen
from mdt_jax.pretrained.autoencoder import Autoencoder, read_autoencoder
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
  """Checks the settings of a run and builds its objects.

  Data and autoencoder are opened on first use, or by `Experiment.open`. `config.eval`
  is checked at the start of training; see `evaluation.evaluator.check_eval`.

  Args:
    config: settings, see `mdt_jax.config.default_config`.
    devices: devices of the run; None for all devices of all processes.
    model, objective, optimizer, source: user-defined objects that replace those of the
      config; see `OwnParts`. None: as in the config.

  Raises:
    SettingError: a setting is invalid, settings do not fit together, or a user-defined
      object does not fit. The error names the first problem.
  """
  if isinstance(config, ConfigDict):
    config = Settings.from_config(config)
  own = OwnParts(model, objective, optimizer, source)
  experiment = Experiment(config, devices, own)
  experiment.check()
  return experiment


class Experiment:
  """The objects of a run; each is built once, on first use.

  Properties that build an object raise SettingError if a setting is invalid.

  Attributes:
    settings: settings of the run.
    data_labels: the labels that the training data holds, set by `open` or when a
      checkpoint is loaded; None if they are unknown.

  Args:
    settings: settings of the run.
    devices: devices of the run; None for all devices of all processes.
    own: user-defined objects that replace those of the settings.
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
    self.data_labels: DataLabels | None = None
    self._read: Autoencoder | None = None  # see `read_autoencoder`
    if (source := self._own.source) is not None:
      # Sampling reads from the checkpoint's settings whether the run used pixels.
      kind = "images" if _has_pixels(source) else "arrays"
      self.settings = settings.with_data(source=kind, path=f"<{type(source).__name__}>")
    if settings.model.attention_kernel == AUTO and self._own.model is None:
      self._choose_kernel()

  def __repr__(self) -> str:
    return f"Experiment({self.model_name})"

  def check(self) -> None:
    """Builds network, process, objective and optimizer, and checks the mesh.

    Raises:
      SettingError: a setting is invalid, or settings do not fit together.
    """
    own = self._own.optimizer
    if own is not None and not (hasattr(own, "init") and hasattr(own, "update")):
      raise SettingError(
        "optimizer", own, "must be an optax.GradientTransformation (init, update)"
      )
    _ = self.model, self.process, self.objective, self.optimizer
    channels = self.model.in_channels * (2 if self.process.learns_variance else 1)
    if self.model.out_channels != channels:
      raise SettingError(
        "model",
        type(self.model).__name__,
        f"must return {channels} channels for config.diffusion.variance = "
        f"{self.settings.diffusion.variance!r}, returns {self.model.out_channels}; "
        "learn_sigma=True doubles the channels, for learned_range",
      )
    sampling = self.settings.sampling
    is_continuous = isinstance(self.process, ContinuousProcess)
    if is_continuous or sampling.method in TIME_SOLVERS or sampling.arguments:
      _ = self.sampler  # process, method and arguments must fit each other
    if sampling.needs_null and self.model.conditioning.dropout == 0:
      raise SettingError(
        "config.sampling.cfg_scale",
        sampling.cfg_scale,
        "must be 1 if the network is trained with label_dropout = 0",
      )
    kernel = self.settings.model.attention_kernel
    if problem := kernel_problem(kernel, self.model, self.objective, self._devices):
      raise SettingError(
        "config.model.attention_kernel", kernel, f"{problem}; or use plain"
      )
    mesh = self.settings.mesh
    sharding.check_mesh(
      (mesh.data, mesh.fsdp, mesh.tensor),
      jax.devices() if self._devices is None else self._devices,
      mesh.slices,
      self.model,
      batch_size=self.settings.batch_size,
      accumulation_steps=self.settings.accumulation_steps,
      groups=self.objective.groups,
    )

  def _choose_kernel(self) -> None:
    """Replaces config.model.attention_kernel = auto by what the devices run."""
    tried = self.settings.with_attention_kernel(FASTEST)
    fused = Experiment(tried, self._devices, self._own)
    try:
      problem = kernel_problem(FASTEST, fused.model, fused.objective, self._devices)
    except SettingError as error:
      if not error.setting.endswith("attention_kernel"):
        raise
      problem = error.accepted
    self.settings = self.settings.with_attention_kernel("plain") if problem else tried
    logger.info(
      "attention kernel: %s", f"plain ({FASTEST} {problem})" if problem else FASTEST
    )

  def read_autoencoder(self) -> None:
    """Reads the autoencoder of the run from its files, if it has one.

    Several processes that load an autoencoder wait for each other as they put it on the
    devices. With this call before, a file that one process lacks is found earlier.

    Raises:
      SettingError: see `load_autoencoder`.
    """
    self._read = self._read_anew()

  def open(self) -> DataLabels:
    """Builds the mesh and opens the autoencoder and the data now.

    All processes of a run must call this together.

    Returns:
      The labels that the data holds.

    Raises:
      SettingError: the mesh does not fit the devices, or the autoencoder or the data
        cannot be opened.
    """
    _ = self.mesh, self.autoencoder
    self.data_labels = DataLabels.of(self.source)
    self.data_labels.warn_of_order()
    return self.data_labels

  @functools.cached_property
  def model(self) -> Model:
    """The network."""
    if self._own.model is not None:
      check_network(self._own.model)
      return self._own.model
    return builders.build_model(self.settings, learn_sigma=self.process.learns_variance)

  @functools.cached_property
  def process(self) -> Process:
    """The diffusion process used in training, with all of its times."""
    return builders.build_process(self.settings)

  @functools.cached_property
  def objective(self) -> Objective:
    """The objective: random draws and loss of a training step."""
    return builders.build_objective(
      self.settings, self.model, self.process, self._own.objective
    )

  @functools.cached_property
  def learning_rate(self) -> Schedule | None:
    """The learning-rate schedule; None for a user-defined optimizer."""
    if self._own.optimizer is not None:
      return None
    return builders.build_learning_rate(self.settings)

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The optimizer; frozen parameters are not updated."""
    if self.learning_rate is not None:
      return builders.build_optimizer(
        self.settings, self.model, self.learning_rate, self.frozen
      )
    rates = self.settings.optimizer.learning_rates
    if rates:
      raise SettingError(
        "config.optimizer.learning_rates",
        rates,
        "must be empty for a user-defined optimizer",
      )
    assert self._own.optimizer is not None
    return without_frozen(self._own.optimizer, self.frozen)

  @functools.cached_property
  def frozen(self) -> frozenset[str]:
    """Paths of the parameters that are not trained."""
    return builders.find_frozen(self.settings, self.model)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """The device mesh of the run."""
    return sharding.make_mesh(
      **dataclasses.asdict(self.settings.mesh), devices=self._devices
    )

  @functools.cached_property
  def sampler(self) -> Sampler:
    """The sampler of `config.sampling`."""
    return builders.build_sampler(self.settings, self.process)

  @functools.cached_property
  def autoencoder(self) -> Autoencoder | None:
    """The autoencoder, replicated over the mesh; None if `config.data.vae` is None."""
    if self.settings.data.vae is None:
      return None
    placement = sharding.replicated(self.mesh)
    read, self._read = self._read, None  # frees the memory of the host
    return read.placed(placement) if read else self.load_autoencoder(placement)

  @functools.cached_property
  def source(self) -> Source:
    """The labelled training examples."""
    return self._part_of_examples(0)

  @functools.cached_property
  def held_out(self) -> Source:
    """The labelled validation examples; needs `config.data.validation` above 0."""
    return self._part_of_examples(1)

  @property
  def model_name(self) -> str:
    """Name of the network for logs: its preset, or the class of a user's network."""
    if self._own.model is not None:
      return type(self._own.model).__name__
    return self.settings.model.name

  @property
  def encodes_images(self) -> bool:
    """Whether the data are images that the autoencoder encodes batch by batch.

    True for the sources "images" and "npz" with `config.data.vae`. False if the data
    are latents already, or the network works on pixels. See `encode`.
    """
    data = self.settings.data
    return data.source in ("images", "npz") and data.vae is not None

  @property
  def holds_pixels(self) -> bool:
    """Whether the network generates pixels; False for latents."""
    data = self.settings.data
    check_choice("config.data.source", data.source, SOURCES)
    return SOURCES[data.source].pixels and data.vae is None

  def encode(self, batch: Batch) -> Batch:
    """Replaces "image" by "moments" if `encodes_images`; else returns the batch."""
    if not self.encodes_images or self.autoencoder is None:
      return batch
    encoded = dict(batch)
    encoded["moments"] = self.autoencoder.moments(encoded.pop("image"))
    return encoded

  def with_sampling(self, changes: Mapping[str, Any]) -> Experiment:
    """Returns an experiment with changed `config.sampling`; shares other objects.

    Args:
      changes: see `Settings.with_sampling`.
    """
    return self._sharing(self.settings.with_sampling(changes))

  def with_data(self, **changes: Any) -> Experiment:
    """Returns an experiment with changed `config.data`; shares network and process.

    Args:
      **changes: see `Settings.with_data`.
    """
    return self._sharing(self.settings.with_data(**changes))

  def with_vae(self, vae: str | None) -> Experiment:
    """Returns an experiment with another autoencoder; shares network and process.

    Args:
      vae: folder or hub id; None keeps the autoencoder of this experiment.

    Raises:
      SettingError: `vae` is given, but the network generates pixels.
    """
    if vae is not None and self.holds_pixels:
      raise SettingError("vae", vae, "must be left out: this model draws pixels")
    return self.with_data(vae=vae) if vae else self

  def load_autoencoder(
    self, placement: jax.sharding.Sharding | None = None
  ) -> Autoencoder | None:
    """Loads the autoencoder of `config.data.vae` anew; None if the setting is None.

    Args:
      placement: sharding of the parameters; None for the first device.

    Raises:
      SettingError: the autoencoder cannot be loaded, or its latents have another number
        of channels than the network.
    """
    read = self._read_anew()
    return None if read is None else read.placed(placement)

  def _read_anew(self) -> Autoencoder | None:
    """Reads the autoencoder of `config.data.vae`; None if the setting is None."""
    vae = self.settings.data.vae
    if vae is None:
      return None
    dtype = DTYPES[self.settings.model.dtype]
    return read_autoencoder(vae, dtype, self.model.in_channels)

  def _sharing(self, settings: Settings) -> Experiment:
    """Returns an experiment with other settings that shares unaffected objects."""
    keeps_data = settings.data == self.settings.data
    own = self._own if keeps_data else dataclasses.replace(self._own, source=None)
    other = Experiment(settings, self._devices, own)
    other.data_labels = self.data_labels
    other.__dict__["model"] = self.model
    other.__dict__["process"] = self.process
    if keeps_data and "autoencoder" in self.__dict__:
      other.__dict__["autoencoder"] = self.autoencoder
    return other

  def _part_of_examples(self, part: int) -> Source:
    """Returns the training examples (part 0) or the validation examples (part 1)."""
    share, examples = self.settings.data.validation, self._examples
    if not 0 <= share <= 0.5:
      raise SettingError("config.data.validation", share, "must lie in [0, 0.5]")
    if part == share == 0:
      return examples
    if share and getattr(examples, "is_endless", False):
      accepted = "must be 0: the data is endless"
      raise SettingError("config.data.validation", share, accepted)
    indices = split_indices(len(examples), share)[part]
    if not len(indices):
      raise SettingError(
        "config.data.validation", share, "must be larger: no example is held out"
      )
    return Subset(examples, indices)

  @functools.cached_property
  def _examples(self) -> Source:
    """All labelled examples: training and validation."""
    return builders.open_examples(
      self.settings.data,
      self.model,
      self._image_shape(),
      self.autoencoder,
      self._own.source,
    )

  def _image_shape(self) -> tuple[int, int, int]:
    """Returns the required shape (H, W, C) of the images or latents in the data."""
    height, width, channels = self.model.input_shape
    if not self.encodes_images or self.autoencoder is None:
      return height, width, channels
    factor = self.autoencoder.model.downsampling
    return height * factor, width * factor, 3


def _has_pixels(source: Source) -> bool:
  """Returns whether the examples of a source hold uint8 images."""
  example = source[0] if len(source) else {}
  return getattr(example.get("image"), "dtype", None) == np.uint8
