"""From labels to images: noise, guided sampling, in blocks spread over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mdt_jax import factories
from mdt_jax.diffusion.gaussian import GaussianDiffusion
from mdt_jax.diffusion.guidance import ModelFn, guided
from mdt_jax.diffusion.samplers import is_random, sample, step_noise
from mdt_jax.models.masking import TokenMask, token_mask_from_noise
from mdt_jax.models.mdt import MDT
from mdt_jax.sharding import fetch

Array = jax.Array
Params = Any
Given = dict[str, Array]
# (params, labels (B,), ids (B,), seed, [given]) -> (B, H, W, C) float32
Generator = Callable[..., Array]

HOLD_STREAM = 1  # of an image's random numbers: the noise on what is held


@dataclasses.dataclass(frozen=True)
class Task:
  """What becomes of an image that is given; each other task is compiled anew.

  Attributes:
    kind: "draw" from noise alone; "inpaint" the hidden part; "edit" the whole from an
      intermediate step (SDEdit, arXiv 2108.01073).
    interpolation: of "inpaint", the share of the process, from full noise, in which
      the side-interpolater predicts the hidden tokens from the visible ones.
    repeats: of "inpaint", how often each step is taken; see `samplers.sample`.
    num_keep: of "inpaint", the number of tokens that are not wholly hidden.
    strength: of "edit", where the noise starts, as a share of the process.
  """

  kind: str = "draw"
  interpolation: float = 0.0
  repeats: int = 1
  num_keep: int = 0
  strength: float = 1.0


DRAW = Task()


def make_generator(
  config: ConfigDict, task: Task = DRAW, platform: str | None = None
) -> Generator:
  """The jitted sampler that `config.sampling` and a task describe.

  Args:
    config: of a run.
    task: what becomes of an image that is given.
    platform: "cpu", "gpu" or "tpu", where it will run; None for where JAX runs.

  Returns:
    (params, labels (B,), ids (B,), seed, [given]) -> latents (B, H, W, C) float32. All
    the noise of an image derives from (seed, its id), so that it does not depend on
    the batch that the image is part of. `given` holds, for "inpaint" and "edit",
    "image" (B, H, W, C) float32, and for "inpaint" "hidden" (H, W) and
    "hidden_tokens" (L,) bool.
  """
  platform = platform or jax.default_backend()
  model = factories.make_model(config)
  sampling = config.sampling
  diffusion = factories.make_sampled_diffusion(config)
  shape = (model.input_size, model.input_size, model.in_channels)

  @jax.jit
  def generate(
    params: Params,
    labels: Array,
    ids: Array,
    seed: Array,
    given: Given | None = None,
  ) -> Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
    start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(start_keys)
    start, num_steps, hold = noise, diffusion.num_timesteps, None

    if task.kind == "edit":
      start, num_steps = _noised(diffusion, given["image"], noise, task.strength)
    if task.kind == "inpaint":
      hold_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, HOLD_STREAM)

      def hold(x: Array, step: Array) -> Array:
        t = jnp.full((len(x),), step)
        # A deterministic path has one noise, a random one another at each step.
        random = is_random(sampling.method, sampling.eta)
        drawn = step_noise(hold_keys, step, x.shape) if random else noise
        known = diffusion.q_sample(given["image"], t, drawn)
        return jnp.where(given["hidden"][..., None], x, known)

    model_fn = _guided_fn(config, model, params, labels, None, platform)
    if task.interpolation:
      mask = token_mask_from_noise(given["hidden_tokens"][None], task.num_keep)
      masked_fn = _guided_fn(config, model, params, labels, mask, platform)
      limit = (1 - task.interpolation) * diffusion.num_original_timesteps
      model_fn = _switch(masked_fn, model_fn, limit)

    x_0 = sample(
      model_fn,
      diffusion,
      start,
      step_keys,
      method=sampling.method,
      eta=sampling.eta,
      clip_denoised=sampling.clip_denoised,
      num_steps=num_steps,
      hold=hold,
      repeats=task.repeats,
    )
    if task.kind == "inpaint":
      return jnp.where(given["hidden"][..., None], x_0, given["image"])
    return x_0

  return generate


def _guided_fn(
  config: ConfigDict,
  model: MDT,
  params: Params,
  labels: Array,
  mask: TokenMask | None,
  platform: str,
) -> ModelFn:
  """The network with guidance, seeing all tokens or those of a mask of one sample."""

  def network(x: Array, t: Array, y: Array) -> Array:
    rows = None
    if mask is not None:
      rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), a.shape[1])), mask)
    return model.apply({"params": params}, x, t, y, rows)

  sampling = config.sampling
  return guided(
    network,
    labels,
    model.num_classes,
    scale=sampling.cfg_scale,
    power=sampling.cfg_power,
    channels=sampling.cfg_channels or None,
    interval=tuple(sampling.cfg_interval),
    num_timesteps=config.diffusion.num_timesteps,
    one_batch=platform != "cpu" or config.model.unroll == 1,
  )


def _switch(first: ModelFn, then: ModelFn, limit: float) -> ModelFn:
  """`first` at timesteps from `limit` up, where sampling begins, then `then`."""
  if limit == 0:
    return first
  return lambda x, t: jax.lax.cond(t[0] >= limit, first, then, x, t)


def _noised(
  diffusion: GaussianDiffusion, image: Array, noise: Array, strength: float
) -> tuple[Array, int]:
  """The image at the last step within `strength` of the process, and the steps left."""
  limit = strength * (diffusion.num_original_timesteps - 1)
  num_steps = int(np.count_nonzero(diffusion.timesteps <= limit))
  t = jnp.full((len(image),), num_steps - 1)
  return diffusion.q_sample(image, t, noise), num_steps


@dataclasses.dataclass(frozen=True)
class Request:
  """N images to be made, in blocks of a size that does not depend on the machine.

  Images of a block are computed together by one device, always the same ones at the
  same places, whichever device and whatever else is left to do: so an image has the
  same bits on one device and on many, in one run and in one that was stopped.

  Attributes:
    labels: (N,) classes.
    seed: image i derives from (seed, i).
    block_size: images of a block; the last one is filled up with the first images.
    image: (H, W, C) float32 given to all of them, or (N, H, W, C), or None.
    hidden: (H, W) bool, what of it is hidden, or None.
    hidden_tokens: (L,) bool, or None.
  """

  labels: np.ndarray
  seed: int
  block_size: int
  image: np.ndarray | None = None
  hidden: np.ndarray | None = None
  hidden_tokens: np.ndarray | None = None

  @property
  def num_blocks(self) -> int:
    return -(-len(self.labels) // self.block_size)

  def ids(self, block: int) -> np.ndarray:
    """Numbers of the images of a block, without what fills it up."""
    start = block * self.block_size
    return np.arange(start, min(start + self.block_size, len(self.labels)))

  def inputs(self, blocks: Sequence[int]) -> tuple[np.ndarray, np.ndarray, Given]:
    """Labels, ids and what is given, of these blocks one after another."""
    starts = np.asarray(blocks)[:, None] * self.block_size
    ids = (starts + np.arange(self.block_size)).reshape(-1) % len(self.labels)
    given = {}
    if self.image is not None:
      per_image = self.image.ndim == 4
      shape = (len(ids), *self.image.shape)
      given["image"] = (
        self.image[ids] if per_image else np.broadcast_to(self.image, shape)
      )
    if self.hidden is not None:
      given["hidden"] = self.hidden
      given["hidden_tokens"] = self.hidden_tokens
    return self.labels[ids].astype(np.int32), ids.astype(np.uint32), given


Finish = Callable[[Any, Array], Array]  # (parameters, latents) -> images


class BlockGenerator:
  """A generator on several devices of this process, a block of a request each.

  Devices do not communicate: each runs the program that one alone would run.

  Args:
    generator: of `make_generator`.
    finish: what follows on the device, such as decoding; (its parameters, latents
      (B, H, W, C)) -> array (B, …).
    devices: to be used.
  """

  def __init__(
    self, generator: Generator, finish: Finish, devices: Sequence[jax.Device]
  ):
    mesh = Mesh(np.asarray(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    given = {"image": split, "hidden": whole, "hidden_tokens": whole}
    self._num_devices = len(devices)
    self._replicated = NamedSharding(mesh, whole)
    self._shardings = {name: NamedSharding(mesh, spec) for name, spec in given.items()}
    self._split = NamedSharding(mesh, split)

    @jax.jit
    def generate(
      params: Params, labels: Array, ids: Array, seed: Array, arrays: Given
    ) -> Array:
      specs = (whole, split, split, whole, {name: given[name] for name in arrays})
      return jax.shard_map(
        generator, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False
      )(params, labels, ids, seed, arrays)

    self._generate = generate
    self._finish = jax.jit(
      jax.shard_map(
        finish, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
      )
    )

  def __call__(
    self,
    params: Params,
    finish_params: Any,
    request: Request,
    blocks: Sequence[int] | None = None,
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Makes blocks of a request; while one is fetched the devices are at the next.

    Args:
      params: of the network.
      finish_params: of `finish`.
      request: what is to be made.
      blocks: which of its blocks; None for all.

    Yields:
      (block, its images without what fills it up), in order.
    """
    blocks = list(range(request.num_blocks) if blocks is None else blocks)
    params = jax.device_put(params, self._replicated)
    finish_params = jax.device_put(finish_params, self._replicated)
    seed = jax.device_put(np.uint32(request.seed), self._replicated)

    def start(group: list[int]) -> Array:
      filled = group + group[:1] * (self._num_devices - len(group))
      labels, ids, given = request.inputs(filled)
      latents = self._generate(
        params,
        jax.device_put(labels, self._split),
        jax.device_put(ids, self._split),
        seed,
        {n: jax.device_put(a, self._shardings[n]) for n, a in given.items()},
      )
      images = self._finish(finish_params, latents)
      images.copy_to_host_async()
      return images

    def fetch(group: list[int], images: Array) -> Iterator[tuple[int, np.ndarray]]:
      rows = np.asarray(images).reshape(-1, request.block_size, *images.shape[1:])
      for block, images_of_block in zip(group, rows, strict=False):
        yield block, images_of_block[: len(request.ids(block))]

    started: tuple[list[int], Array] | None = None
    for first in range(0, len(blocks), self._num_devices):
      group = blocks[first : first + self._num_devices]
      following = (group, start(group))
      if started is not None:
        yield from fetch(*started)
      started = following
    if started is not None:
      yield from fetch(*started)


def generate_batches(
  generator: Generator,
  params: Params,
  labels: np.ndarray,
  *,
  seed: int,
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Generates latents for each label (N,), image i from (seed, i).

  Inside `sharding.use_mesh` its devices share each batch. Of several processes
  all must take part.

  Args:
    generator: of `make_generator`.
    params: averaged parameters.
    labels: (N,) classes.
    seed: in [0, 2**32).
    batch_size: images at a time; shared where it is a multiple of the devices that
      share a batch, else each device does it all.

  Yields:
    (batch_size, H, W, C) float32, the last one shorter; whole in each process.
  """
  request = Request(labels, seed, batch_size)
  for block in range(request.num_blocks):
    block_labels, ids, _ = request.inputs([block])
    images = generator(params, block_labels, ids, np.uint32(seed))
    yield fetch(images)[: len(request.ids(block))]
