"""Images from a checkpoint, for notebooks and for `mdt_jax.sample`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax.generation import generate
from mdt_jax.training.checkpoints import load_ema

Params = Any


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A trained network and all that is needed to sample from it.

  Attributes:
    config: of the run; `config.sampling` holds the defaults of a call.
    params: averaged parameters.
    step: of the checkpoint.
  """

  config: ConfigDict
  params: Params
  step: int

  @classmethod
  def from_checkpoint(
    cls, path: str | Path, step: int | None = None, ema_decay: float | None = None
  ) -> Pipeline:
    """Rebuilds everything from a workdir alone; see `checkpoints.load_ema`."""
    config, params, step = load_ema(path, step, ema_decay)
    return cls(config, params, step)

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
      seed: image i derives from (seed, i) alone.
      batch_size: images sampled at a time.
      progress: show a progress bar.
      **sampling: settings of config.sampling for this call, such as num_steps=50,
        method="ddim" or cfg_scale=1.0.

    Returns:
      (N, H, W, C) float32, pixels in about [-1, 1] or latents.

    Raises:
      SettingError: a label or a setting that cannot be used.
    """
    config = self.config.copy_and_resolve_references()
    config.sampling.update(sampling)
    settings.check(config)
    labels = np.asarray(labels)
    generate.check_labels("--labels", labels, config.model.num_classes)
    batches = generate.generate_batches(
      generate.make_generator(config),
      self.params,
      labels,
      seed=seed,
      batch_size=min(batch_size, len(labels)),
    )
    arrays = []
    with tqdm.tqdm(total=len(labels), unit="image", disable=not progress) as bar:
      for images in batches:
        arrays.append(images)
        bar.update(len(images))
    return np.concatenate(arrays)
