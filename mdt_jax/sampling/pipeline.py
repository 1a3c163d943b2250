"""`Pipeline`: images from a checkpoint, for notebooks and for `mdt_jax.sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from mdt_jax.checkpoints.loading import load_ema
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.experiment import Experiment
from mdt_jax.models.conditions import LabelCondition
from mdt_jax.models.registry import Model
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import Request
from mdt_jax.sampling.generator import DRAW, output_shape
from mdt_jax.sampling.image_jobs import with_editing, with_inpainting
from mdt_jax.sampling.inpainting import ImageLike
from mdt_jax.sampling.job import BlockGenerators, SamplingJob
from mdt_jax.sampling.labels import Labels, parse_labels
from mdt_jax.sampling.writer import ShardedImages
from mdt_jax.settings import SamplingSettings
from mdt_jax.types import Params

NO_VAE = "none"

# Name of a setting in an error -> name of the argument in Python.
SAMPLING_ARGUMENTS = {
  f"config.sampling.{field.name}": field.name
  for field in dataclasses.fields(SamplingSettings)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A trained network with everything that is needed to sample from it.

  Attributes:
    experiment: the run; its settings of sampling are the defaults of a call.
    params: averaged parameters. `from_checkpoint` loads the average of
      `config.sampling.ema_decay`.
    step: training step of the parameters.
    autoencoder: decodes latents; None leaves the network's output as it is.
  """

  experiment: Experiment
  params: Params
  step: int
  autoencoder: Autoencoder | None = None
  _generators: BlockGenerators = dataclasses.field(
    default_factory=dict, init=False, repr=False
  )

  @classmethod
  def from_checkpoint(
    cls,
    path: str | Path,
    step: int | None = None,
    ema_decay: float | None = None,
    vae: str | None = None,
    model: Model | None = None,
  ) -> Pipeline:
    """Loads a pipeline from a workdir.

    Args:
      path, step, ema_decay: see `checkpoints.loading.load_ema`.
      vae: folder or hub id of the autoencoder that decodes latents. None: that of the
        run, if the run has one. "none": no autoencoder.
      model: a network of your own that the run was trained with; None builds the
        network that the config of the run names.

    Raises:
      SettingError: `load_ema` finds no such parameters, they do not fit `model`, there
        is no such autoencoder, or the model draws pixels and needs none.
    """
    with renamed_in_errors({"config.data.vae": "vae"}):
      checkpoint = load_ema(path, step, ema_decay, model)
      experiment, autoencoder = checkpoint.experiment, None
      if vae != NO_VAE:
        experiment = experiment.with_vae(vae)
        autoencoder = experiment.load_autoencoder()
    return cls(experiment, checkpoint.params, checkpoint.step, autoencoder)

  def __repr__(self) -> str:
    height, width, channels = self.image_shape
    kind = "pixels" if self.draws_pixels else "latents"
    # A network that is described by its attributes has no name.
    name = self.experiment.model_name or type(self.model).__name__
    return (
      f"Pipeline({name}, step {self.step}, "
      f"{height}x{width}x{channels} {kind}, {self.model.num_classes} classes)"
    )

  @property
  def model(self) -> Model:
    """The network."""
    return self.experiment.model

  @property
  def has_null_label(self) -> bool:
    """Whether the network can be drawn from without a label."""
    condition = self.model.conditioning
    return isinstance(condition, LabelCondition) and condition.dropout > 0

  @property
  def config(self) -> ConfigDict:
    """A locked copy of the settings of the run, as a ConfigDict."""
    return self.experiment.settings.to_config()

  @property
  def draws_pixels(self) -> bool:
    """Whether the pipeline draws pixels, and not latents."""
    return self.autoencoder is not None or self.experiment.holds_pixels

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of the images, or of the latents."""
    return output_shape(self.model, self.autoencoder)

  def __call__(self, labels: Labels, **arguments: Any) -> list[Image.Image]:
    """Draws an image for each label.

    Args:
      labels: one label, or a list, a tuple or an integer array (N,) of labels, of NumPy
        or JAX. A label is a number in [0, num_classes), or a name where the classes are
        ImageNet's. None, or num_classes, is the null label: the image is drawn
        unconditionally.
      **arguments: of `job`.

    Returns:
      N pictures; one for one label.

    Raises:
      SettingError: a label or a setting cannot be used, or the model draws latents and
        has no autoencoder.
    """
    return self._draw_pictures(labels, arguments)

  def inpaint(
    self, image: ImageLike, mask: ImageLike, labels: Labels, **arguments: Any
  ) -> list[Image.Image]:
    """Paints the part of an image that a mask hides, once for each label.

    Each step holds the visible part at the noise level of the step. The visible pixels
    of the result are those of the image.

    Args:
      image: picture, uint8 array (H, W, C) or path, of the model's size and channels;
        or an array (N, H, W, C), one image for each label.
      mask: picture, array (H, W) or path; white, or True, marks the part to paint.
      labels: see `__call__`.
      **arguments: of `job`, such as `interpolation`.

    Returns:
      N pictures.

    Raises:
      SettingError: as `__call__`, or the image or the mask does not fit.
    """
    return self._draw_pictures(labels, {"inpaint": image, "mask": mask, **arguments})

  def edit(
    self, image: ImageLike, labels: Labels, **arguments: Any
  ) -> list[Image.Image]:
    """Turns an image into an image of another class, once for each label (SDEdit).

    Args:
      image: as for `inpaint`.
      labels: see `__call__`.
      **arguments: of `job`, such as `strength`.

    Returns:
      N pictures.
    """
    return self._draw_pictures(labels, {"edit": image, **arguments})

  def draw(
    self, labels: Labels, *, progress: bool = False, **arguments: Any
  ) -> UInt8[np.ndarray, "N H W C"] | Float[np.ndarray, "N H W C"]:
    """The images of `__call__`, `inpaint` and `edit` as an array.

    Args:
      labels: see `__call__`.
      progress: show a progress bar.
      **arguments: of `job`.

    Returns:
      (N, H, W, C): uint8 pixels, or float32 latents; see `draws_pixels`.
    """
    job = self.job(labels, **arguments)
    with tqdm.tqdm(
      total=len(job.request.labels), unit="image", disable=not progress
    ) as bar:
      parts: list[np.ndarray] = []
      for _, part in job.generate_blocks(range(job.request.num_blocks)):
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
    """Draws images to disk, over all devices of all processes; see `sampling.writer`.

    Args:
      folder: output folder, shared by all processes. A call that was stopped continues
        with the images that the folder lacks.
      labels: see `__call__`.
      png: also write each image as folder/png/LABEL_NUMBER.png.
      progress: show a progress bar with the time left.
      **arguments: of `job`.

    Returns:
      Path of the .npz, which the first process merges: arr_0 (N, H, W, C) uint8, or
      float32 latents, and arr_1 (N,) labels.

    Raises:
      SettingError: as `draw`, or the folder holds unfinished images of other settings.
    """
    job = self.job(labels, **arguments)
    if png and not self.draws_pixels:
      raise SettingError("png", png, "this model draws latents: name its autoencoder")
    sharded = ShardedImages(
      folder,
      job.request,
      job.describe(),
      name="samples" if self.draws_pixels else "latents",
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    if not sharded.is_complete:
      sharded.write(job.generate_blocks, progress=progress and jax.process_index() == 0)
    if png and jax.process_index() == 0:
      sharded.write_pngs()
    return sharded.npz

  def job(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    batch_size: int = 64,
    inpaint: ImageLike | None = None,
    mask: ImageLike | None = None,
    interpolation: float | None = None,
    repeats: int | None = None,
    edit: ImageLike | None = None,
    strength: float | None = None,
    **sampling: Any,
  ) -> SamplingJob:
    """Checks all arguments of a call, before anything is computed.

    Args:
      labels: see `__call__`.
      seed: image i derives from (seed, i) alone; in [0, 2**32).
      batch_size: images that a device generates at a time.
      inpaint, mask: image to paint in, and where to paint; see `inpaint`.
      interpolation: of inpainting: the share of the process, counted from full noise,
        in which the side-interpolater predicts the hidden tokens from the visible
        tokens alone; 0.25 by default where the network has a side-interpolater.
      repeats: of inpainting: how often each step is taken, so that the painted part
        fits the visible part (RePaint); 1 by default. More need "ddpm" or "ddim".
      edit: image to edit; see `edit`.
      strength: of editing: the noise level of the start, as a share of the process,
        above 0 and up to 1; 0.6 by default.
      **sampling: settings of config.sampling for this call, such as num_steps=50,
        method="dpm++" or cfg_scale=1.0.

    Raises:
      SettingError: an argument cannot be used.
    """
    with renamed_in_errors(SAMPLING_ARGUMENTS):
      experiment = self.experiment.with_sampling(sampling)
      scale = experiment.sampler.guidance.scale
    if scale != 1 and self.model.conditioning.dropout == 0:
      raise SettingError(
        "cfg_scale", scale, "must be 1: the network drops no condition"
      )
    label_array = parse_labels(
      "labels", labels, self.model.num_classes, has_null=self.has_null_label
    )
    if not 0 <= seed < 2**32:
      raise SettingError("seed", seed, "must lie in [0, 2**32)")
    if batch_size < 1:
      raise SettingError("batch_size", batch_size, "must be at least 1")
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
    job = SamplingJob(
      experiment,
      self.params,
      self.step,
      self.autoencoder,
      DRAW,
      Request(label_array, seed, min(batch_size, len(label_array))),
      generators=self._generators,
    )
    if inpaint is not None:
      return with_inpainting(job, inpaint, mask, interpolation, repeats)
    if edit is not None:
      return with_editing(job, edit, strength)
    return job

  def _draw_pictures(
    self, labels: Labels, arguments: dict[str, Any]
  ) -> list[Image.Image]:
    if not self.draws_pixels:
      raise SettingError(
        "vae", None, "this model draws latents: name its autoencoder, or use draw()"
      )
    return [pictures.to_pil(pixels) for pixels in self.draw(labels, **arguments)]
