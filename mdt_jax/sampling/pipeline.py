"""Images from a checkpoint, for notebooks and for `mdt_jax.sample`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict
from PIL import Image

from mdt_jax import factories
from mdt_jax.checkpoints.manager import load_ema
from mdt_jax.data.transforms import to_float
from mdt_jax.diffusion.solvers import SOLVERS
from mdt_jax.errors import SettingError
from mdt_jax.models.autoencoder_kl import AutoencoderKL, decode_in_slices
from mdt_jax.sampling import batches, inpainting, pictures
from mdt_jax.sampling.batches import BlockGenerator, Request, Task
from mdt_jax.sampling.labels import parse_labels
from mdt_jax.sampling.overrides import with_sampling, with_vae
from mdt_jax.sampling.writer import ShardedImages

if TYPE_CHECKING:
  from mdt_jax.pretrained.autoencoder import Autoencoder

Params = Any
Labels = Sequence[int | str] | np.ndarray
NO_VAE = "none"
DEFAULT_INTERPOLATION = 0.25
DEFAULT_STRENGTH = 0.6


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A trained network and all that is needed to sample from it.

  Attributes:
    config: of the run; `config.sampling` holds the defaults of a call.
    params: averaged parameters; of `from_checkpoint` those of
      `config.sampling.ema_decay`.
    step: of the checkpoint.
    autoencoder: decodes latents; None leaves them as they are.
  """

  config: ConfigDict
  params: Params
  step: int
  autoencoder: Autoencoder | None = None
  _generators: dict[Any, BlockGenerator] = dataclasses.field(
    default_factory=dict, repr=False
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

    Raises:
      SettingError: as `checkpoints.load_ema`; there is no such autoencoder, or none is
        needed.
    """
    config, params, step = load_ema(path, step, ema_decay)
    config.sampling.ema_decay = factories.sampled_decay(config, ema_decay)
    if vae == NO_VAE:
      return cls(config, params, step)
    config = with_vae(config, vae)
    return cls(config, params, step, factories.make_autoencoder(config))

  @property
  def draws_pixels(self) -> bool:
    """Whether images come out, and not latents."""
    return self.autoencoder is not None or factories.holds_pixels(self.config)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    return factories.image_shape(self.config, self.autoencoder)

  def __call__(self, labels: Labels, **arguments: Any) -> list[Image.Image]:
    """Draws an image for each label.

    Args:
      labels: N classes: numbers, or names where they are ImageNet's.
      **arguments: see `draw`.

    Returns:
      N pictures.

    Raises:
      SettingError: a label or a setting that cannot be used, or a model of latents
        without an autoencoder.
    """
    return self._draw_pictures(labels, arguments)

  def inpaint(
    self,
    image: inpainting.ImageLike,
    mask: inpainting.ImageLike,
    labels: Labels,
    **arguments: Any,
  ) -> list[Image.Image]:
    """Paints what a mask hides of an image, once for each label.

    The visible part is held at every step, noised to the step's level; the visible
    pixels of the result are those of the image.

    Args:
      image: picture, uint8 array (H, W, C) or path, of the model's size and channels;
        or (N, H, W, C), one for each label.
      mask: picture, array (H, W) or path; white, or True, is painted.
      labels: N classes.
      **arguments: see `draw`; such as `interpolation`.

    Returns:
      N pictures.

    Raises:
      SettingError: as `__call__`; an image or a mask that does not fit.
    """
    return self._draw_pictures(labels, {"inpaint": image, "mask": mask, **arguments})

  def edit(
    self, image: inpainting.ImageLike, labels: Labels, **arguments: Any
  ) -> list[Image.Image]:
    """Turns an image into one of another class, once for each label (SDEdit).

    Args:
      image: as for `inpaint`.
      labels: N classes.
      **arguments: see `draw`; such as `strength`.

    Returns:
      N pictures.
    """
    return self._draw_pictures(labels, {"edit": image, **arguments})

  def draw(
    self, labels: Labels, *, progress: bool = False, **arguments: Any
  ) -> np.ndarray:
    """The images of `__call__`, `inpaint` and `edit` as an array.

    Args:
      labels: N classes.
      progress: show a progress bar.
      **arguments: of `plan`.

    Returns:
      (N, H, W, C): uint8 pixels, or float32 latents; see `draws_pixels`.
    """
    plan = self.plan(labels, **arguments)
    with tqdm.tqdm(total=len(labels), unit="image", disable=not progress) as bar:
      parts = []
      for _, part in plan.make_blocks(range(plan.request.num_blocks)):
        parts.append(part)
        bar.update(len(part))
    return np.concatenate(parts)

  def write(
    self,
    folder: str | Path,
    labels: Labels,
    *,
    png: bool = False,
    progress: bool = True,
    **arguments: Any,
  ) -> Path:
    """Draws images to disk, over all devices of all processes; see `shards`.

    Args:
      folder: shared by all processes. A call that was stopped goes on from there.
      labels: N classes.
      png: write each image as folder/png/LABEL_NUMBER.png too.
      progress: show a bar with the time left.
      **arguments: of `plan`.

    Returns:
      The .npz, merged by the first process: arr_0 (N, H, W, C) uint8, or float32
      latents, and arr_1 (N,) labels.

    Raises:
      SettingError: as `draw`; the folder holds unfinished images of other settings.
    """
    plan = self.plan(labels, **arguments)
    if png and not self.draws_pixels:
      raise SettingError("png", png, "this model draws latents: name its autoencoder")
    sharded = ShardedImages(
      folder,
      plan.request,
      plan.describe(),
      name="samples" if self.draws_pixels else "latents",
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    if not sharded.is_complete:
      sharded.write(plan.make_blocks, progress=progress and jax.process_index() == 0)
    if png and jax.process_index() == 0:
      sharded.write_pngs()
    return sharded.npz

  def plan(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    batch_size: int = 64,
    inpaint: inpainting.ImageLike | None = None,
    mask: inpainting.ImageLike | None = None,
    interpolation: float | None = None,
    repeats: int | None = None,
    edit: inpainting.ImageLike | None = None,
    strength: float | None = None,
    **sampling: Any,
  ) -> Plan:
    """Checks all arguments of a call, before anything is computed.

    Args:
      labels: N classes.
      seed: image i derives from (seed, i) alone; in [0, 2**32).
      batch_size: images that a device makes at a time.
      inpaint, mask: image to be painted in, and where; see `inpaint`.
      interpolation: of inpainting, the share of the process, from full noise, in
        which the side-interpolater predicts the hidden tokens from the visible ones
        alone.
      repeats: of inpainting, how often each step is taken, so that what is painted
        fits what is visible (RePaint); 1 by default, more with ddpm or ddim alone.
      edit: image to be edited; see `edit`.
      strength: of editing, the noise it starts from, above 0 and up to 1, as a share
        of the process.
      **sampling: settings of config.sampling for this call, such as num_steps=50,
        method="dpm++" or cfg_scale=1.0.
    """
    config = with_sampling(self.config, sampling)
    labels = parse_labels("labels", labels, config.model.num_classes)
    if not 0 <= seed < 2**32:
      raise SettingError("seed", seed, "must lie in [0, 2**32)")
    if batch_size < 1:
      raise SettingError("batch_size", batch_size, "must be at least 1")
    request = Request(labels, seed, min(batch_size, len(labels)))
    for name, value, needed, given in (
      ("mask", mask, "inpaint", inpaint),
      ("interpolation", interpolation, "inpaint", inpaint),
      ("repeats", repeats, "inpaint", inpaint),
      ("strength", strength, "edit", edit),
    ):
      if value is not None and given is None:
        raise SettingError(name, value, f"goes with an image to {needed}")
    if inpaint is not None and edit is not None:
      raise SettingError("edit", edit, "must be left out, as an image is inpainted")
    if inpaint is not None:
      return self._plan_inpainting(
        config, request, inpaint, mask, interpolation, 1 if repeats is None else repeats
      )
    if edit is not None:
      return self._plan_editing(config, request, edit, strength)
    return Plan(self, config, batches.DRAW, request)

  def _plan_inpainting(
    self,
    config: ConfigDict,
    request: Request,
    image: inpainting.ImageLike,
    mask: inpainting.ImageLike | None,
    interpolation: float | None,
    repeats: int,
  ) -> Plan:
    pixels = self._read_image("inpaint", image, len(request.labels))
    hidden_pixels = inpainting.read_mask("mask", mask, self.image_shape[0])
    hidden = hidden_pixels
    if self.autoencoder is not None:
      factor = self.autoencoder.model.downsampling
      hidden = inpainting.downsample_mask("mask", hidden_pixels, factor)
    model = factories.make_model(config)
    tokens = inpainting.hidden_tokens(hidden, model.patch_size)
    if interpolation is None:
      interpolation = DEFAULT_INTERPOLATION if model.takes_mask else 0.0
    if repeats < 1 or (repeats > 1 and config.sampling.method in SOLVERS):
      raise SettingError("repeats", repeats, "must be 1, or more with ddpm or ddim")
    if not 0 <= interpolation <= 1:
      raise SettingError("interpolation", interpolation, "must lie in [0, 1]")
    if interpolation and not model.takes_mask:
      raise SettingError(
        "interpolation", interpolation, "must be 0: DiT has no side-interpolater"
      )
    task = Task(
      "inpaint",
      # With no token hidden there is nothing to interpolate.
      interpolation=interpolation if tokens.any() else 0.0,
      repeats=repeats,
      num_keep=int(np.count_nonzero(~tokens)),
    )
    request = dataclasses.replace(
      request, image=self._encode(pixels), hidden=hidden, hidden_tokens=tokens
    )
    return Plan(self, config, task, request, pixels, hidden_pixels)

  def _plan_editing(
    self,
    config: ConfigDict,
    request: Request,
    image: inpainting.ImageLike,
    strength: float | None,
  ) -> Plan:
    strength = DEFAULT_STRENGTH if strength is None else strength
    if not 0 < strength <= 1:
      raise SettingError("strength", strength, "must be above 0 and up to 1")
    pixels = self._read_image("edit", image, len(request.labels))
    request = dataclasses.replace(request, image=self._encode(pixels))
    return Plan(self, config, Task("edit", strength=strength), request, pixels)

  def _read_image(
    self, setting: str, image: inpainting.ImageLike, count: int
  ) -> np.ndarray:
    """Pixels (H, W, C) uint8 of one image, or (N, H, W, C) of an array of them."""
    if not self.draws_pixels:
      raise SettingError("vae", None, "this model takes latents: name its autoencoder")
    size, _, channels = self.image_shape
    if not (isinstance(image, np.ndarray) and image.ndim == 4):
      return inpainting.read_image(setting, image, size, channels)
    if len(image) != count:
      raise SettingError(setting, f"{len(image)} images", f"must be {count}, as labels")
    return np.stack(
      [inpainting.read_image(setting, one, size, channels) for one in image]
    )

  def _encode(self, pixels: np.ndarray) -> np.ndarray:
    """What the network sees of images: pixels in [-1, 1], or their mean latents."""
    if self.autoencoder is None:
      return to_float(pixels)
    rows = pixels.reshape(-1, 1, *self.image_shape)
    latents = np.concatenate([self.autoencoder.moments(row)[:, 0] for row in rows])
    return latents if pixels.ndim == 4 else latents[0]

  def _draw_pictures(
    self, labels: Labels, arguments: dict[str, Any]
  ) -> list[Image.Image]:
    if not self.draws_pixels:
      raise SettingError(
        "vae", None, "this model draws latents: name its autoencoder, or use draw()"
      )
    return [pictures.to_pil(pixels) for pixels in self.draw(labels, **arguments)]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A call of a pipeline whose arguments were checked.

  Attributes:
    pipeline: whose call it is.
    config: with the settings of sampling of the call.
    task: what becomes of an image that is given.
    request: the images to be made.
    pixels: the image given, (H, W, C) or (N, H, W, C) uint8, or None.
    hidden: (H, W) bool, what of its pixels is painted, or None.
  """

  pipeline: Pipeline
  config: ConfigDict
  task: Task
  request: Request
  pixels: np.ndarray | None = None
  hidden: np.ndarray | None = None

  def make_blocks(self, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of the request, on all devices of this process; see `BlockGenerator`."""
    if not blocks:  # all are made, or there are fewer than processes
      return
    autoencoder = self.pipeline.autoencoder
    made = self._generator(min(len(blocks), jax.local_device_count()))(
      self.pipeline.params,
      {} if autoencoder is None else autoencoder.params,
      self.request,
      blocks,
    )
    for block, images_of_block in made:
      if self.hidden is not None:
        ids = self.request.ids(block)
        visible = self.pixels[ids] if self.pixels.ndim == 4 else self.pixels
        images_of_block = np.where(self.hidden[..., None], images_of_block, visible)
      yield block, images_of_block

  def describe(self) -> dict[str, Any]:
    """All that the images depend on, as JSON gives it back."""
    described = {
      "step": self.pipeline.step,
      "parameters": _digest(*jax.tree.leaves(self.pipeline.params)),
      "images": len(self.request.labels),
      "labels": _digest(self.request.labels),
      "seed": self.request.seed,
      "batch_size": self.request.block_size,
      "vae": self.config.data.vae,
      **{f"sampling.{k}": v for k, v in self.config.sampling.to_dict().items()},
      "task": dataclasses.asdict(self.task),
    }
    if self.pixels is not None:
      described["image"] = _digest(self.pixels)
    if self.hidden is not None:
      described["mask"] = _digest(self.hidden)
    return json.loads(json.dumps(described))

  def _generator(self, num_devices: int) -> BlockGenerator:
    """Compiled for these settings, once for all calls."""
    key = (self.config.sampling.to_json(), self.task, num_devices)
    generators = self.pipeline._generators
    if key not in generators:
      generators[key] = BlockGenerator(
        batches.make_generator(self.config, self.task),
        self._finish(),
        jax.local_devices()[:num_devices],
      )
    return generators[key]

  def _finish(self) -> batches.Finish:
    """What follows the sampler on the device."""
    if self.pipeline.autoencoder is not None:
      return functools.partial(_decode, self.pipeline.autoencoder.model)
    if self.pipeline.draws_pixels:
      return lambda _, pixels: pictures.to_uint8_on_device(pixels)
    return lambda _, latents: latents


def _decode(model: AutoencoderKL, params: Params, latents: jax.Array) -> jax.Array:
  decoded = decode_in_slices(model, params, model.unscale(latents))
  return pictures.to_uint8_on_device(decoded)


def _digest(*arrays: Any) -> str:
  """Names the contents of arrays."""
  digest = hashlib.blake2b(digest_size=8)
  for array in arrays:
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()
