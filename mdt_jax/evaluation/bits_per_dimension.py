"""Bits a dimension of a data set under a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.data.sources import Source
from mdt_jax.data.transforms import pixels_to_float, without_draws
from mdt_jax.diffusion.likelihood import calc_bpd

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

Array = jax.Array
Params = Any
# (params, batch, ids (B,), seed) -> terms of `calc_bpd`
Bound = Callable[[Params, dict[str, Array], Array, Array], dict[str, Array]]


def make_bound(
  config: ConfigDict,
  num_steps: int | None = None,
  autoencoder: Autoencoder | None = None,
) -> Bound:
  """The jitted bound of a run's network, conditioned on the labels.

  Args:
    config: of the run.
    num_steps: of a respaced process; None for every timestep, as released.
    autoencoder: encodes images, where the run does so.

  Returns:
    (params, batch, ids, seed) -> terms of `calc_bpd`. The noise of an image derives
    from (seed, its id), whatever the batch; of latents the means are taken.
  """
  model = factories.make_model(config)
  spacing = "" if num_steps is None else str(num_steps)
  diffusion = factories.make_diffusion(config, spacing=spacing)

  @jax.jit
  def bound(
    params: Params, batch: dict[str, Array], ids: Array, seed: Array
  ) -> dict[str, Array]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    return calc_bpd(
      lambda x, t: model.apply({"params": params}, x, t, batch["label"]),
      diffusion,
      batch["moments"][:, 0] if "moments" in batch else batch["image"],
      keys,
      clip_denoised=factories.holds_pixels(config),
    )

  if not factories.encodes_images(config):
    return bound

  def bound_of_images(
    params: Params, batch: dict[str, Array], ids: Array, seed: Array
  ) -> dict[str, Array]:
    moments = autoencoder.moments(batch["image"])
    return bound(params, {"moments": moments, "label": batch["label"]}, ids, seed)

  return bound_of_images


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
    examples = [without_draws(source[int(i)]) for i in ids]
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *examples)
    terms = bound(
      params,
      pixels_to_float(batch),
      jnp.asarray(ids, jnp.uint32),
      jnp.asarray(seed, jnp.uint32),
    )
    yield {name: np.asarray(term)[:count] for name, term in terms.items()}
