"""Generation of many images in blocks of a fixed size, distributed over devices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped, UInt32

from mdt_jax.diffusion.samplers import OnStep
from mdt_jax.logs import logger
from mdt_jax.sampling.generator import Generator, Given
from mdt_jax.sharding import fetch
from mdt_jax.types import Array, Params

# (decoder parameters, latents (B, H, W, C)) -> images (B, …); runs on the device
Decode: TypeAlias = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """N images to generate, split into blocks of a fixed size.

  One device generates the images of a block together. A block always holds the same
  images at the same places. So an image has the same bits on any number of devices, and
  in a resumed run.

  Attributes:
    labels: (N,) classes, or (N, …) conditions of the network that are not classes.
    classes: (N,) classes of conditions that hold more; None for `labels`, if these are
      classes.
    captions: N texts for grids; None for the names of the classes.
    null: (N, …) negative conditions of guidance; None for the null condition.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
    block_size: number of images in a block. The last block is filled up with the first
      images of the request.
    image: image to inpaint or edit, as input of the network: (H, W, C) float32 for all
      images, or (N, H, W, C); None to sample from noise alone.
    hidden: (H, W) bool, True where the image is painted; None without inpainting.
    hidden_tokens: (L,) bool, True for tokens without a visible part; None without
      inpainting.
  """

  labels: Shaped[np.ndarray, "N ..."]
  seed: int
  block_size: int
  image: Float[np.ndarray, "*N H W C"] | None = None
  hidden: Bool[np.ndarray, "H W"] | None = None
  hidden_tokens: Bool[np.ndarray, "L"] | None = None
  classes: Int[np.ndarray, "N"] | None = None
  captions: Sequence[str] | None = None
  null: Shaped[np.ndarray, "N ..."] | None = None

  @property
  def known_classes(self) -> Int[np.ndarray, "N"] | None:
    """Classes of the images; None if their conditions have none."""
    if self.classes is None and self.labels.ndim == 1:
      return np.asarray(self.labels, np.int64)
    return self.classes

  @property
  def num_blocks(self) -> int:
    """Number of blocks of the request."""
    return -(-len(self.labels) // self.block_size)

  def ids(self, block: int) -> Int[np.ndarray, "n"]:
    """Numbers of the images of a block, without the images that fill up the block."""
    start = block * self.block_size
    return np.arange(start, min(start + self.block_size, len(self.labels)))

  def inputs(
    self, blocks: Sequence[int]
  ) -> tuple[
    Shaped[np.ndarray, "B ..."],
    UInt32[np.ndarray, "B"],
    dict[str, Shaped[np.ndarray, "..."]],
  ]:
    """The inputs of a generator for some blocks.

    Args:
      blocks: numbers of the blocks.

    Returns:
      (labels, ids, given): labels (B, …) int32 or float32, image numbers (B,) uint32,
      and the arrays of `make_generator`'s argument `given`, where
      B = len(blocks) * block_size.
    """
    starts = np.asarray(blocks)[:, None] * self.block_size
    ids = (starts + np.arange(self.block_size)).reshape(-1) % len(self.labels)
    given: dict[str, np.ndarray] = {}
    if self.image is not None:
      per_image = self.image.ndim == 4
      shape = (len(ids), *self.image.shape)
      given["image"] = (
        self.image[ids] if per_image else np.broadcast_to(self.image, shape)
      )
    if self.hidden is not None and self.hidden_tokens is not None:
      given["hidden"] = self.hidden
      given["hidden_tokens"] = self.hidden_tokens
    is_float = np.issubdtype(self.labels.dtype, np.floating)
    dtype = np.float32 if is_float else np.int32
    labels = self.labels[ids].astype(dtype)
    if self.null is not None:
      given["null"] = self.null[ids].astype(dtype)
    return labels, ids.astype(np.uint32), given


class Listener:
  """Passes the steps of a compiled generator on to the function of the current call.

  Attributes:
    on_step: see `samplers.sample`; None to ignore the steps.
  """

  def __init__(self) -> None:
    self.on_step: OnStep | None = None

  def __call__(self, done: int, total: int) -> None:
    if self.on_step is not None:
      self.on_step(done, total)


class BlockGenerator:
  """Runs a generator on several devices of this process, one block on each device.

  Devices do not communicate: each device runs the same program as a single device
  would. A mesh that the caller has set has no effect.

  Args:
    generator: generator from `make_generator`.
    decode: function that turns the latents into images on the device; see `Decode`.
    devices: devices to use.
    listener: `on_step` of the generator; None if the generator reports no steps.

  Attributes:
    listener: see above.
  """

  def __init__(
    self,
    generator: Generator,
    decode: Decode,
    devices: Sequence[Any],
    listener: Listener | None = None,
  ):
    self.listener = listener or Listener()
    mesh = Mesh(np.asarray(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    given_specs = {"image": split, "hidden": whole, "hidden_tokens": whole}
    given_specs["null"] = split
    self._mesh = mesh
    self._num_devices = len(devices)
    self._replicated = NamedSharding(mesh, whole)
    self._shardings = {
      name: NamedSharding(mesh, spec) for name, spec in given_specs.items()
    }
    self._split = NamedSharding(mesh, split)

    @jax.jit
    def generate(
      params: Params, labels: Array, ids: Array, seed: Array, given: Given
    ) -> Array:
      specs = {name: given_specs[name] for name in given}
      return jax.shard_map(
        generator,
        mesh=mesh,
        in_specs=(whole, split, split, whole, specs),
        out_specs=split,
        check_vma=False,
      )(params, labels, ids, seed, given)

    self._generate = generate
    self._decode = jax.jit(
      jax.shard_map(
        decode, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False
      )
    )

  def __call__(
    self,
    params: Params,
    decode_params: Params,
    request: Request,
    blocks: Sequence[int] | None = None,
  ) -> Iterator[tuple[int, Shaped[np.ndarray, "n ..."]]]:
    """Generates blocks of a request.

    Each device computes one block ahead of the block that is yielded.

    Args:
      params: parameters of the network.
      decode_params: parameters of `decode`.
      request: the images to generate.
      blocks: numbers of the blocks to generate; None for all blocks.

    Yields:
      (number of the block, images (n, …) of the block), in the order of `blocks`.
    """
    blocks = list(range(request.num_blocks) if blocks is None else blocks)
    with set_only_mesh(self._mesh):
      params = jax.device_put(params, self._replicated)
      decode_params = jax.device_put(decode_params, self._replicated)
      seed = jax.device_put(np.uint32(request.seed), self._replicated)

    def start(group: list[int]) -> tuple[Array, Array]:
      filled = group + group[:1] * (self._num_devices - len(group))
      labels, ids, given = request.inputs(filled)
      # The mesh is set only here, so the caller's mesh is in place at each `yield`.
      with set_only_mesh(self._mesh):
        latents = self._generate(
          params,
          jax.device_put(labels, self._split),
          jax.device_put(ids, self._split),
          seed,
          {n: jax.device_put(a, self._shardings[n]) for n, a in given.items()},
        )
        images = self._decode(decode_params, latents)
        finite = _are_finite(latents)
      images.copy_to_host_async()
      return images, finite

    def finish(
      group: list[int], images: Array, finite: Array
    ) -> Iterator[tuple[int, np.ndarray]]:
      rows, finite_rows = (
        np.asarray(array).reshape(-1, request.block_size, *array.shape[1:])
        for array in (images, finite)
      )
      for block, row, finite_row in zip(group, rows, finite_rows, strict=False):
        ids = request.ids(block)
        _warn_of_not_finite(ids, finite_row[: len(ids)])
        yield block, row[: len(ids)]

    started: tuple[list[int], Array, Array] | None = None
    for first in range(0, len(blocks), self._num_devices):
      group = blocks[first : first + self._num_devices]
      following = (group, *start(group))
      if started is not None:
        yield from finish(*started)
      started = following
    if started is not None:
      yield from finish(*started)


@jax.jit
def _are_finite(latents: Array) -> Bool[Array, "B"]:
  """Whether all numbers of each latent are finite."""
  return jnp.isfinite(latents).all(axis=(1, 2, 3))


@contextlib.contextmanager
def set_only_mesh(mesh: Mesh) -> Iterator[None]:
  """Sets `mesh` for the block, without the caller's mesh and logical axis rules."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(()):
    yield


def generate_batches(
  generator: Generator,
  params: Params,
  labels: Shaped[np.ndarray, "N ..."],
  *,
  seed: int,
  batch_size: int,
) -> Iterator[Float[np.ndarray, "n *calls H W C"]]:
  """Generates latents for labels, one batch at a time.

  Inside `sharding.use_mesh`, the devices of the mesh share each batch. All processes
  must call this function together.

  Args:
    generator: generator from `make_generator`; with kept calls, each image has one
      more axis.
    params: averaged parameters of the network.
    labels: (N,) classes, or (N, …) other conditions, as in `Request`.
    seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
    batch_size: number of images in a batch. If `batch_size` is not a multiple of the
      number of devices along the batch axes, each device computes the whole batch.

  Yields:
    (batch_size, H, W, C) float32 latents, the whole batch on each process. The last
    batch may be shorter.
  """
  request = Request(labels, seed, batch_size)
  for block in range(request.num_blocks):
    block_labels, ids, _ = request.inputs([block])
    images = generator(params, block_labels, ids, np.uint32(seed))
    found = fetch(images)[: len(request.ids(block))]
    if jax.process_index() == 0:  # every process holds the whole batch
      finite = np.isfinite(found).reshape(len(found), -1).all(axis=1)
      _warn_of_not_finite(request.ids(block), np.asarray(finite))
    yield found


def _warn_of_not_finite(
  ids: Int[np.ndarray, "n"], finite: Bool[np.ndarray, "n"]
) -> None:
  """Warns of images that hold NaN or infinity, which become black pixels."""
  if not finite.all():
    logger.warning(
      "images %d to %d: %d hold NaN or infinity, which become black; the network is "
      "trained too little, or has diverged",
      ids[0],
      ids[-1],
      int((~finite).sum()),
    )
