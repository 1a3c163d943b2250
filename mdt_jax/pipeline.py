"""Images from a checkpoint, for notebooks and for `mdt_jax.sample`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax.errors import SettingError
from mdt_jax.generation import generate
from mdt_jax.training.checkpoints import load_ema

if TYPE_CHECKING:
  from mdt_jax.data.autoencoder import Autoencoder

Params = Any
NO_VAE = "none"


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A trained network and all that is needed to sample from it.

  Attributes:
    config: of the run; `config.sampling` holds the defaults of a call.
    params: averaged parameters.
    step: of the checkpoint.
    autoencoder: decodes latents; None leaves them as they are.
  """

  config: ConfigDict
  params: Params
  step: int
  autoencoder: Autoencoder | None = None
  _generators: dict[str, generate.Generator] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    step: int | None = None,
    ema_decay: float | None = None,
    vae: str | None = None,
  ) -> Pipeline:
    """Rebuilds everything from a workdir.

    Args:
      path, step, ema_decay: see `checkpoints.load_ema`.
      vae: folder or hub id of the autoencoder that decodes latents; None for that of
        the run, if it has one; "none" for none.
    """
    config, params, step = load_ema(path, step, ema_decay)
    if vae == NO_VAE or settings.holds_pixels(config):
      return cls(config, params, step)
    config.data.vae = vae or config.data.vae
    return cls(config, params, step, settings.make_autoencoder(config))

  @property
  def draws_pixels(self) -> bool:
    """Whether a call gives pixels, and not latents."""
    return self.autoencoder is not None or settings.holds_pixels(self.config)

  def __call__(
    self,
    labels: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    **sampling: Any,
  ) -> np.ndarray:
    """Samples an image for each label.

    Args:
      labels: N classes.
      seed: image i derives from (seed, i) alone; in [0, 2**32).
      batch_size: images sampled at a time.
      progress: show a progress bar.
      **sampling: settings of config.sampling for this call, such as num_steps=50,
        method="ddim" or cfg_scale=1.0.

    Returns:
      (N, H, W, C) float32, pixels in about [-1, 1], or latents; see `draws_pixels`.

    Raises:
      SettingError: a label or a setting that cannot be used.
    """
    config = self._configure(sampling)
    labels = self._check_labels(labels)
    if not 0 <= seed < 2**32:
      raise SettingError("seed", seed, "must lie in [0, 2**32)")
    if batch_size < 1:
      raise SettingError("batch_size", batch_size, "must be at least 1")
    key = config.sampling.to_json()
    if key not in self._generators:
      self._generators[key] = generate.make_generator(config)
    batches = generate.generate_batches(
      self._generators[key],
      self.params,
      labels,
      seed=seed,
      batch_size=min(batch_size, len(labels)),
    )
    arrays = []
    with tqdm.tqdm(total=len(labels), unit="image", disable=not progress) as bar:
      for images in batches:
        if self.autoencoder is not None:
          images = self.autoencoder.decode(images)
        arrays.append(images)
        bar.update(len(images))
    return np.concatenate(arrays)

  def _configure(self, sampling: dict[str, Any]) -> ConfigDict:
    """The config with other settings of sampling."""
    config = self.config.copy_and_resolve_references()
    for name, value in sampling.items():
      if name not in config.sampling:
        accepted = ", ".join(sorted(config.sampling))
        raise SettingError(name, value, f"is no setting of sampling: {accepted}")
      try:
        config.sampling[name] = value
      except TypeError:
        kind = type(config.sampling[name]).__name__
        raise SettingError(
          f"config.sampling.{name}", value, f"must be {kind}"
        ) from None
    settings.check(config)
    return config

  def _check_labels(self, labels: Sequence[int]) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
      raise SettingError("labels", labels, "must be a list of whole numbers")
    generate.check_labels("labels", array, self.config.model.num_classes)
    return array
