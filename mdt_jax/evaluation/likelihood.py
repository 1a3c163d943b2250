"""Bits a dimension of a data set under a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import config as settings
from mdt_jax.data.sources import Source
from mdt_jax.data.transforms import to_float
from mdt_jax.diffusion.likelihood import calc_bpd

Array = jax.Array
Params = Any
# (params, images (B, H, W, C), labels (B,), ids (B,), seed) -> terms of `calc_bpd`
Bound = Callable[[Params, Array, Array, Array, Array], dict[str, Array]]


def make_bound(config: ConfigDict, num_steps: int | None = None) -> Bound:
  """The jitted bound of a run's network, conditioned on the labels.

  Args:
    config: of the run.
    num_steps: of a respaced process; None for every timestep, as released.

  Returns:
    (params, images, labels, ids, seed) -> terms of `calc_bpd`. The noise of an image
    derives from (seed, its id), whatever the batch.
  """
  model = settings.make_model(config)
  spacing = "" if num_steps is None else str(num_steps)
  diffusion = settings.make_diffusion(config, spacing=spacing)

  @jax.jit
  def bound(
    params: Params, images: Array, labels: Array, ids: Array, seed: Array
  ) -> dict[str, Array]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    return calc_bpd(
      lambda x, t: model.apply({"params": params}, x, t, labels),
      diffusion,
      images,
      keys,
      clip_denoised=model.in_channels in (1, 3),
    )

  return bound


def bounds(
  bound: Bound,
  params: Params,
  source: Source,
  indices: np.ndarray,
  *,
  seed: int,
  batch_size: int,
) -> Iterator[dict[str, np.ndarray]]:
  """The bound of images of a source, batch by batch.

  Args:
    bound: of `make_bound`.
    params: of the network.
    source: of labelled images.
    indices: (N,) which of them.
    seed: image i derives its noise from (seed, i).
    batch_size: images at a time.

  Yields:
    Terms of `calc_bpd` for each batch; the last one may be shorter.
  """
  for start in range(0, len(indices), batch_size):
    count = min(batch_size, len(indices) - start)
    # The last batch is filled up, so that one compilation serves all.
    ids = indices[(start + np.arange(batch_size)) % len(indices)]
    examples = [source[int(i)] for i in ids]
    images = np.stack([example["image"] for example in examples])
    if images.dtype == np.uint8:
      images = to_float(images)
    terms = bound(
      params,
      jnp.asarray(images, jnp.float32),
      jnp.asarray([example["label"] for example in examples], jnp.int32),
      jnp.asarray(ids, jnp.uint32),
      jnp.asarray(seed, jnp.uint32),
    )
    yield {name: np.asarray(term)[:count] for name, term in terms.items()}
