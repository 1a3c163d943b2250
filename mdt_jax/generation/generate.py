"""From labels to images: noise, guided sampling, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax.diffusion.guidance import guided
from mdt_jax.diffusion.samplers import sample
from mdt_jax.errors import SettingError
from mdt_jax.training.sharding import fetch

Array = jax.Array
Params = Any
# (params, labels (B,), ids (B,), seed) -> (B, H, W, C) float32
Generator = Callable[[Params, Array, Array, Array], Array]


def make_generator(config: ConfigDict) -> Generator:
  """The jitted sampler that `config.sampling` describes.

  Returns:
    (params, labels (B,), ids (B,), seed) -> latents (B, H, W, C) float32. All the
    noise of an image derives from (seed, its id), so that it does not depend on the
    batch that the image is part of.
  """
  model = settings.make_model(config)
  sampling = config.sampling
  diffusion = settings.make_diffusion(config, spacing=str(sampling.num_steps))
  shape = (model.input_size, model.input_size, model.in_channels)

  @jax.jit
  def generate(params: Params, labels: Array, ids: Array, seed: Array) -> Array:
    def network(x: Array, t: Array, y: Array) -> Array:
      return model.apply({"params": params}, x, t, y)

    model_fn = guided(
      network,
      labels,
      model.num_classes,
      scale=sampling.cfg_scale,
      power=sampling.cfg_power,
      channels=sampling.cfg_channels or None,
      num_timesteps=diffusion.num_original_timesteps,
    )
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    x_T = jax.vmap(lambda key: jax.random.normal(key, shape))(start_keys)
    return sample(
      model_fn,
      diffusion,
      x_T,
      step_keys,
      method=sampling.method,
      eta=sampling.eta,
      clip_denoised=sampling.clip_denoised,
    )

  return generate


def generate_batches(
  generator: Generator,
  params: Params,
  labels: np.ndarray,
  *,
  seed: int,
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Generates an image for each label (N,), image i from (seed, i).

  Yields:
    (batch_size, H, W, C) float32, the last one shorter.
  """
  for start in range(0, len(labels), batch_size):
    count = min(batch_size, len(labels) - start)
    # The last batch is filled up, so that one compilation serves all.
    ids = (start + np.arange(batch_size)) % len(labels)
    images = generator(
      params, labels[ids].astype(np.int32), ids.astype(np.uint32), np.uint32(seed)
    )
    yield fetch(images)[:count]


def check_labels(setting: str, labels: np.ndarray, num_classes: int) -> None:
  """Raises SettingError for a label outside 0 … num_classes - 1."""
  for label in labels:
    if not 0 <= label < num_classes:
      raise SettingError(
        setting, int(label), f"labels of this model are 0 … {num_classes - 1}"
      )
