"""A sampling job: the checked arguments of one call of a pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from mdt_jax.diffusion.samplers import OnStep
from mdt_jax.experiment import Experiment
from mdt_jax.logs import counted
from mdt_jax.models.autoencoder_decoding import decode_in_slices
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import BlockGenerator, Decode, Listener, Request
from mdt_jax.sampling.generator import Task, make_generator, output_shape
from mdt_jax.sampling.token_guidance import Pair, sampling_flops
from mdt_jax.sampling.weak_networks import WeakNetwork
from mdt_jax.setting_groups import SamplingSettings
from mdt_jax.types import Array, Params

# (text of the settings and of the weak network, task, number of devices, whether steps
# are reported) -> the compiled generator
BlockGenerators: TypeAlias = dict[tuple[str, Task, int, bool], BlockGenerator]
# Settings of sampling that `describe` leaves out if they have their defaults.
_LATER_SETTINGS = (
  "arguments",
  "weak_condition",
  "strong_ratio",
  "weak_ratio",
  "ratio_schedule",
)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingJob:
  """One call of a pipeline, with checked arguments; see `Pipeline.job`.

  Attributes:
    experiment: objects of the run; `experiment.sampler` has the settings of the call.
    params: averaged parameters of the network.
    step: training step of the parameters.
    autoencoder: decodes latents; None returns the output of the network.
    task: draw, inpaint or edit.
    request: the images to generate.
    pixels: image to inpaint or edit, (H, W, C) or (N, H, W, C) uint8, or None.
    hidden: (H, W) bool, True where `pixels` are painted; None without inpainting.
    generators: compiled generators, shared by the jobs of a pipeline.
    weak: network of the weak pass of guidance; None for the network itself.
  """

  experiment: Experiment
  params: Params
  step: int
  autoencoder: Autoencoder | None
  task: Task
  request: Request
  pixels: UInt8[np.ndarray, "*N H W C"] | None = None
  hidden: Bool[np.ndarray, "H W"] | None = None
  generators: BlockGenerators = dataclasses.field(default_factory=dict, repr=False)
  weak: WeakNetwork | None = None

  def __repr__(self) -> str:
    sampling, count = self.experiment.settings.sampling, len(self.request.labels)
    return (
      f"SamplingJob({self.task.kind} {counted(count, 'image')}, "
      f"{sampling.method} in {sampling.num_steps} steps, "
      f"cfg_scale {sampling.cfg_scale}, seed {self.request.seed})"
    )

  @property
  def draws_pixels(self) -> bool:
    """Whether the job generates pixels; otherwise it generates latents."""
    return self.autoencoder is not None or self.experiment.holds_pixels

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a generated image or latent."""
    return output_shape(self.experiment.model, self.autoencoder)

  @property
  def flops(self) -> float:
    """Operations of the networks for an image; see `models.flops`."""
    weak = None if self.weak is None else self.weak.model
    return sampling_flops(self.experiment.model, self.experiment.sampler, weak)

  def generate_blocks(
    self, blocks: Sequence[int], on_step: OnStep | None = None
  ) -> Iterator[tuple[int, Shaped[np.ndarray, "n H W C"]]]:
    """Generates blocks of the request on the devices of this process.

    Args:
      blocks: numbers of the blocks.
      on_step: called by each device at each step, from other threads; see
        `samplers.sample`. None compiles a program that does not call the host.

    Yields:
      (number of the block, images of the block (n, H, W, C)), in the order of `blocks`.
      The images are uint8 pixels or float32 latents; see `draws_pixels`.
    """
    if not blocks:  # all blocks exist, or there are more processes than blocks
      return
    num_devices = min(len(blocks), jax.local_device_count())
    generator = self._generator(num_devices, reports=on_step is not None)
    generator.listener.on_step = on_step
    generated = generator(
      self.params if self.weak is None else Pair(self.params, self.weak.params),
      {} if self.autoencoder is None else self.autoencoder.params,
      self.request,
      blocks,
    )
    for block, images in generated:
      yield block, self.keep_visible(block, images)

  def keep_visible(
    self, block: int, images: Shaped[np.ndarray, "n H W C"]
  ) -> Shaped[np.ndarray, "n H W C"]:
    """Overwrites the visible pixels of the images of a block by those of the image."""
    if self.pixels is None or self.hidden is None:
      return images
    ids = self.request.ids(block)
    visible = self.pixels[ids] if self.pixels.ndim == 4 else self.pixels
    return np.where(self.hidden[..., None], images, visible)

  def describe(self) -> dict[str, Any]:
    """Everything that the images depend on, as a dict of JSON values.

    `ShardedImages` compares this description to decide whether a job can be resumed.
    """
    settings = self.experiment.settings
    sampling = dataclasses.asdict(settings.sampling)
    default = dataclasses.asdict(SamplingSettings())
    for name in _LATER_SETTINGS:  # earlier versions have none
      if sampling[name] == default[name]:
        del sampling[name]
    described = {
      "step": self.step,
      "parameters": _digest(*jax.tree.leaves(self.params)),
      "images": len(self.request.labels),
      "labels": _digest(self.request.labels),
      "seed": self.request.seed,
      "batch_size": self.request.block_size,
      "vae": settings.data.vae,
      **{f"sampling.{name}": value for name, value in sampling.items()},
      "task": dataclasses.asdict(self.task),
    }
    if self.draws_pixels and pictures.rounds_to_nearest(self.experiment.model):
      # Earlier versions rounded as MDT does.
      described["pixels"] = "127.5 x + 128"
    if self.request.classes is not None:
      described["classes"] = _digest(self.request.classes)
    if self.request.null is not None:
      described["null"] = _digest(self.request.null)
    if self.weak is not None:
      described["weak_parameters"] = _digest(*jax.tree.leaves(self.weak.params))
    if self.autoencoder is not None:
      scales = json.dumps(self.autoencoder.scales()).encode()
      leaves = jax.tree.leaves(self.autoencoder.params)
      described["autoencoder"] = _digest(*leaves, np.frombuffer(scales, np.uint8))
    if self.pixels is not None:
      described["image"] = _digest(self.pixels)
    if self.hidden is not None:
      described["mask"] = _digest(self.hidden)
    return json.loads(json.dumps(described))

  def _generator(self, num_devices: int, reports: bool) -> BlockGenerator:
    """The compiled generator, which jobs with equal settings share."""
    settings = repr(self.experiment.settings.sampling)
    weak_model = None if self.weak is None else self.weak.model
    key = (f"{settings} {weak_model}", self.task, num_devices, reports)
    if key not in self.generators:
      listener = Listener()
      generator = make_generator(
        self.experiment.model,
        self.experiment.sampler,
        self.task,
        on_step=listener if reports else None,
        weak_model=weak_model,
      )
      devices = jax.local_devices()[:num_devices]
      self.generators[key] = BlockGenerator(
        generator, self.make_decode(), devices, listener
      )
    return self.generators[key]

  def make_decode(self) -> Decode:
    """Returns the function that turns latents into images, on the device."""
    network = self.experiment.model
    if self.autoencoder is not None:
      model = self.autoencoder.model

      def decode(params: Params, latents: Array) -> UInt8[Array, "B H W 3"]:
        images = decode_in_slices(model, params, model.unscale(latents))
        return pictures.to_uint8(images, network)

      return decode
    if self.experiment.holds_pixels:
      return lambda _, pixels: pictures.to_uint8(pixels, network)
    return lambda _, latents: latents


def _digest(*arrays: Any) -> str:
  """A short hash of the contents of arrays."""
  digest = hashlib.blake2b(digest_size=8)
  for array in arrays:
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()
