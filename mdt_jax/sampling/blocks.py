"""Requests for many images: blocks of a fixed size, shared over devices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, Shaped, UInt32

from mdt_jax.sampling.generator import Generator, Given
from mdt_jax.sharding import fetch
from mdt_jax.types import Array, Params

# (parameters of the decoder, latents (B, H, W, C)) -> images (B, …), on the device
Decode: TypeAlias = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """N images to generate, in blocks whose size does not depend on the machine.

  One device generates the images of a block together. A block always holds the same
  images at the same places, whichever device generates it and whichever blocks
  remain. So an image has the same bits on one device and on many, in one run and in a
  resumed run.

  Attributes:
    labels: (N,) classes, or (N, …) what the network is conditioned on otherwise.
    seed: image i derives from (seed, i); in [0, 2**32).
    block_size: images in a block; the first images fill up the last block.
    image: (H, W, C) float32, given to all images, or (N, H, W, C), or None.
    hidden: (H, W) bool, the part of the image to paint, or None.
    hidden_tokens: (L,) bool, or None.
  """

  labels: Shaped[np.ndarray, "N ..."]
  seed: int
  block_size: int
  image: Float[np.ndarray, "*N H W C"] | None = None
  hidden: Bool[np.ndarray, "H W"] | None = None
  hidden_tokens: Bool[np.ndarray, "L"] | None = None

  @property
  def num_blocks(self) -> int:
    """Blocks of the request."""
    return -(-len(self.labels) // self.block_size)

  def ids(self, block: int) -> Int[np.ndarray, "n"]:
    """Numbers of the images of a block, without the images that fill it up."""
    start = block * self.block_size
    return np.arange(start, min(start + self.block_size, len(self.labels)))

  def inputs(
    self, blocks: Sequence[int]
  ) -> tuple[
    Shaped[np.ndarray, "B ..."],
    UInt32[np.ndarray, "B"],
    dict[str, Shaped[np.ndarray, "..."]],
  ]:
    """The inputs of a generator for blocks, one block after another.

    Args:
      blocks: numbers of the blocks.

    Returns:
      (labels (B, …) int32 or float32, ids (B,) uint32, given), where
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
    labels = self.labels[ids].astype(np.float32 if is_float else np.int32)
    return labels, ids.astype(np.uint32), given


class BlockGenerator:
  """Runs a generator on several devices of this process, a block on each.

  Devices do not communicate: each device runs the program that a single device runs.
  A mesh that the caller has set has no effect.

  Args:
    generator: of `make_generator`.
    decode: what follows on the device: (its parameters, latents (B, H, W, C)) -> images
      (B, …).
    devices: devices to use.
  """

  def __init__(self, generator: Generator, decode: Decode, devices: Sequence[Any]):
    mesh = Mesh(np.asarray(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    given_specs = {"image": split, "hidden": whole, "hidden_tokens": whole}
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
    """Generates blocks of a request; the devices compute ahead by one block each.

    Args:
      params: of the network.
      decode_params: of `decode`.
      request: the images to generate.
      blocks: numbers of the blocks to generate; None for all.

    Yields:
      (number of the block, its images), in order.
    """
    blocks = list(range(request.num_blocks) if blocks is None else blocks)
    with set_only_mesh(self._mesh):
      params = jax.device_put(params, self._replicated)
      decode_params = jax.device_put(decode_params, self._replicated)
      seed = jax.device_put(np.uint32(request.seed), self._replicated)

    def start(group: list[int]) -> Array:
      filled = group + group[:1] * (self._num_devices - len(group))
      labels, ids, given = request.inputs(filled)
      # Ends before a `yield`: the caller's mesh is set again between two blocks.
      with set_only_mesh(self._mesh):
        latents = self._generate(
          params,
          jax.device_put(labels, self._split),
          jax.device_put(ids, self._split),
          seed,
          {n: jax.device_put(a, self._shardings[n]) for n, a in given.items()},
        )
        images = self._decode(decode_params, latents)
      images.copy_to_host_async()
      return images

    def finish(group: list[int], images: Array) -> Iterator[tuple[int, np.ndarray]]:
      rows = np.asarray(images).reshape(-1, request.block_size, *images.shape[1:])
      for block, images_of_block in zip(group, rows, strict=False):
        yield block, images_of_block[: len(request.ids(block))]

    started: tuple[list[int], Array] | None = None
    for first in range(0, len(blocks), self._num_devices):
      group = blocks[first : first + self._num_devices]
      following = (group, start(group))
      if started is not None:
        yield from finish(*started)
      started = following
    if started is not None:
      yield from finish(*started)


@contextlib.contextmanager
def set_only_mesh(mesh: Mesh) -> Iterator[None]:
  """Inside, `mesh` replaces the caller's mesh and the caller's names of its axes."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(()):
    yield


def generate_batches(
  generator: Generator,
  params: Params,
  labels: Shaped[np.ndarray, "N ..."],
  *,
  seed: int,
  batch_size: int,
) -> Iterator[Float[np.ndarray, "n H W C"]]:
  """Generates latents for labels in batches; image i derives from (seed, i).

  Inside `sharding.use_mesh` the devices of the mesh share each batch. All processes
  must take part.

  Args:
    generator: of `make_generator`.
    params: averaged parameters.
    labels: (N,) classes, or (N, …), as of `Request`.
    seed: in [0, 2**32).
    batch_size: images in a batch. Devices share a batch whose size is a multiple of
      the number of devices that share batches; otherwise each computes all of it.

  Yields:
    Whole batches (batch_size, H, W, C) float32 on each process; the last one is
    shorter.
  """
  request = Request(labels, seed, batch_size)
  for block in range(request.num_blocks):
    block_labels, ids, _ = request.inputs([block])
    images = generator(params, block_labels, ids, np.uint32(seed))
    yield fetch(images)[: len(request.ids(block))]
