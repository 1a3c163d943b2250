"""`Pipeline` draws, inpaints and edits images with a trained network."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Unpack

import jax
import numpy as np
import tqdm
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image

from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.hub_folders import load_pretrained, load_run
from mdt_jax.checkpoints.loading import Checkpoint, load_ema
from mdt_jax.errors import SettingError, renamed_in_errors
from mdt_jax.experiment import Experiment
from mdt_jax.logs import logger
from mdt_jax.models.registry import Model
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.pretrained.torch_mdt import KnownSizes
from mdt_jax.sampling import pictures
from mdt_jax.sampling.conditions import Arrays
from mdt_jax.sampling.generator import DRAW, output_shape
from mdt_jax.sampling.image_jobs import with_editing, with_inpainting
from mdt_jax.sampling.inpainting import ImageLike
from mdt_jax.sampling.job import BlockGenerators, SamplingJob
from mdt_jax.sampling.labels import Labels
from mdt_jax.sampling.requests import check_needed, make_request
from mdt_jax.sampling.token_guidance import check_tokens
from mdt_jax.sampling.weak_networks import load_weak
from mdt_jax.sampling.writer import ShardedImages
from mdt_jax.setting_groups import SamplingSettings
from mdt_jax.types import Params

NO_VAE = "none"  # value of `vae` that disables the autoencoder

# Name of a setting in an error -> name of the argument of `Pipeline.job`.
SAMPLING_ARGUMENTS = {
  f"config.sampling.{field.name}": field.name
  for field in dataclasses.fields(SamplingSettings)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A trained network with its sampler and autoencoder.

  Attributes:
    experiment: objects of the run; its `config.sampling` holds the defaults of a call.
    params: averaged parameters of the network. `from_checkpoint` loads the average
      whose decay is `config.sampling.ema_decay`.
    step: training step of the parameters.
    autoencoder: decodes latents; None returns the output of the network.
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
    path: str | os.PathLike[str],
    step: int | None = None,
    ema_decay: float | None = None,
    vae: str | None = None,
    model: Model | None = None,
  ) -> Pipeline:
    """Loads a pipeline from a workdir, local or in a bucket (gs://…).

    Args:
      path, step, ema_decay: see `checkpoints.loading.load_ema`.
      vae: folder or Hugging Face id of the autoencoder that decodes latents. None uses
        the autoencoder of the run, if there is one; "none" uses no autoencoder.
      model: your own network, if the run was trained with one; None builds the network
        that the config of the run describes.

    Raises:
      SettingError: the checkpoint or the autoencoder cannot be loaded, the parameters
        do not fit `model`, or `vae` names an autoencoder although the model draws
        pixels.
    """
    return cls._of(load_ema(path, step, ema_decay, model), vae)

  @classmethod
  def from_pretrained(
    cls,
    name: str | os.PathLike[str],
    vae: str | None = None,
    network: str | None = None,
    **known: Unpack[KnownSizes],
  ) -> Pipeline:
    """Loads a pipeline from the Hugging Face hub, or from a folder of the same files.

    Args:
      name: ORG/NAME of a repository, or a folder, local or in a bucket (gs://…), with
        the files that mdt_jax.convert --push uploads, or with a DiT in diffusers'
        format.
      vae: see `from_checkpoint`.
      network, **known: see `checkpoints.hub_folders.load_pretrained`.

    Raises:
      SettingError: see `load_pretrained`, and `from_checkpoint` for `vae`.
    """
    return cls._of(load_pretrained(name, network, **known), vae)

  @classmethod
  def load(
    cls,
    path: str | os.PathLike[str],
    step: int | None = None,
    ema_decay: float | None = None,
    vae: str | None = None,
  ) -> Pipeline:
    """Loads a pipeline from a workdir, or from hf://ORG/NAME on the Hugging Face hub.

    Args:
      path, step, ema_decay: see `checkpoints.hub_folders.load_run`.
      vae: see `from_checkpoint`.

    Raises:
      SettingError: see `load_run`, and `from_checkpoint` for `vae`.
    """
    return cls._of(load_run(path, step, ema_decay), vae)

  @classmethod
  def _of(cls, checkpoint: Checkpoint, vae: str | None) -> Pipeline:
    """Returns the pipeline of a checkpoint; see `from_checkpoint` for `vae`."""
    experiment, autoencoder = checkpoint.experiment, None
    with renamed_in_errors({"config.data.vae": "vae"}):
      if vae != NO_VAE:
        experiment = experiment.with_vae(vae)
        autoencoder = experiment.load_autoencoder()
    return cls(experiment, checkpoint.params, checkpoint.step, autoencoder)

  def __repr__(self) -> str:
    height, width, channels = self.image_shape
    kind = "pixels" if self.draws_pixels else "latents"
    # A network that the config describes by its attributes has no name.
    name = self.experiment.model_name or type(self.model).__name__
    condition = [*self.model.conditioning.arrays()]
    if not condition or self.model.conditioning.label is not None:
      condition.insert(0, f"{self.model.num_classes} classes")
    return (
      f"Pipeline({name}, step {self.step}, "
      f"{height}x{width}x{channels} {kind}, {', '.join(condition)})"
    )

  @property
  def model(self) -> Model:
    """The network."""
    return self.experiment.model

  @property
  def has_null_label(self) -> bool:
    """Whether the network can draw images without a class."""
    label = self.model.conditioning.label
    return label is not None and label.dropout > 0

  @property
  def config(self) -> ConfigDict:
    """The settings of the run, as a locked ConfigDict; changes have no effect."""
    return self.experiment.settings.to_config()

  @property
  def draws_pixels(self) -> bool:
    """Whether the pipeline draws pixels; otherwise it draws latents."""
    return self.autoencoder is not None or self.experiment.holds_pixels

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a drawn image or latent."""
    return output_shape(self.model, self.autoencoder)

  def __call__(self, labels: Labels = None, **arguments: Any) -> list[Image.Image]:
    """Draws an image for each label, or for each array of a condition.

    Args:
      labels: one label, or N labels in a list, a tuple or an integer NumPy or JAX array
        (N,); left out for a network of arrays alone, which needs `condition`, an
        argument of `job`. A label is a class number in [0, num_classes), or the name
        of a class of the training data, or of ImageNet if the model has ImageNet's
        1,000 classes. None or num_classes is the null label, which draws an image of no
        particular class.
      **arguments: arguments of `job`, such as num_steps=50.

    Returns:
      A list of N PIL images; N = 1 for one label.

    Raises:
      SettingError: a label or an argument is invalid, or the model draws latents and
        has no autoencoder.
    """
    return self._draw_pictures(labels, arguments)

  def inpaint(
    self, image: ImageLike, mask: ImageLike, labels: Labels, **arguments: Any
  ) -> list[Image.Image]:
    """Paints the part of an image that a mask hides, once for each label.

    In each sampling step, the visible part is replaced by the image at the noise level
    of the step. The result has the same visible pixels as the image.

    Args:
      image: PIL image, uint8 array (H, W, C) or path, of the model's size and channels;
        or a uint8 array (N, H, W, C) with one image for each label.
      mask: PIL image, uint8 or bool array (H, W), or path. White or True marks the part
        to paint.
      labels: see `__call__`.
      **arguments: arguments of `job`, such as `interpolation`.

    Returns:
      A list of N PIL images.

    Raises:
      SettingError: see `__call__`; or the image or the mask does not fit the model.
    """
    return self._draw_pictures(labels, {"inpaint": image, "mask": mask, **arguments})

  def edit(
    self, image: ImageLike, labels: Labels, **arguments: Any
  ) -> list[Image.Image]:
    """Turns an image into an image of another class, once for each label.

    The method is SDEdit (arXiv 2108.01073): add noise to the image, then sample.

    Args:
      image: see `inpaint`.
      labels: classes of the results; see `__call__`.
      **arguments: arguments of `job`, such as `strength`.

    Returns:
      A list of N PIL images.

    Raises:
      SettingError: see `__call__`; or the image does not fit the model.
    """
    return self._draw_pictures(labels, {"edit": image, **arguments})

  def draw(
    self, labels: Labels = None, *, progress: bool = False, **arguments: Any
  ) -> UInt8[np.ndarray, "N H W C"] | Float[np.ndarray, "N H W C"]:
    """Draws, inpaints or edits like the other methods, but returns an array.

    Args:
      labels: see `__call__`.
      progress: whether to show a progress bar.
      **arguments: arguments of `job`.

    Returns:
      (N, H, W, C) uint8 pixels in [0, 255], or float32 latents; see `draws_pixels`.

    Raises:
      SettingError: an argument is invalid.
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
    folder: str | os.PathLike[str],
    labels: Labels = None,
    *,
    png: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **arguments: Any,
  ) -> AnyPath:
    """Draws images and writes them to a folder, with all devices of all processes.

    Call `write` again to resume a stopped call. `sampling.writer` lists the files.

    Args:
      folder: output folder, shared by all processes; local or in a bucket (gs://…).
      labels: see `__call__`.
      png: whether to write each image also as folder/png/LABEL_NUMBER.png.
      overwrite: whether to replace finished images of other settings in the folder.
      progress: whether to show a progress bar.
      **arguments: arguments of `job`.

    Returns:
      Path of the .npz file, which process 0 writes: arr_0 (N, H, W, C) uint8 pixels or
      float32 latents, and arr_1 (N,) labels, if the condition has labels.

    Raises:
      SettingError: an argument is invalid, or the folder holds images of other
        settings: unfinished ones, or finished ones without `overwrite`.
    """
    job = self.job(labels, **arguments)
    if png and not self.draws_pixels:
      raise SettingError("png", png, "must be False without an autoencoder (vae)")
    sharded = ShardedImages(
      folder,
      job.request,
      job.describe(),
      name="samples" if self.draws_pixels else "latents",
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      overwrite=overwrite,
      caption=str
      if self.experiment.data_labels is None
      else self.experiment.data_labels.caption,
    )
    if not sharded.is_complete:
      if jax.process_index() == 0:
        _log_flops(job)
      sharded.write(job.generate_blocks, progress=progress and jax.process_index() == 0)
    elif jax.process_index() == 0:
      sharded.remove_blocks()  # a stopped process may have left some in a bucket
    if png and jax.process_index() == 0:
      sharded.write_pngs()
    return sharded.npz

  def job(
    self,
    labels: Labels = None,
    *,
    condition: Arrays | None = None,
    null: Any = None,
    seed: int = 0,
    batch_size: int = 64,
    inpaint: ImageLike | None = None,
    mask: ImageLike | None = None,
    interpolation: float | None = None,
    repeats: int | None = None,
    edit: ImageLike | None = None,
    strength: float | None = None,
    weak_checkpoint: str | os.PathLike[str] | None = None,
    weak_step: int | None = None,
    **sampling: Any,
  ) -> SamplingJob:
    """Checks the arguments of a call and returns a job, without computing images.

    Args:
      labels: see `__call__`.
      condition: arrays of the condition, for a network of `config.model.condition`
        vector or tokens: a dict name -> array of one image or (N, …) of N images, or
        one array if the condition has a single one.
      null: negative condition, from which guidance leads away: arrays like `condition`,
        or for a network of labels one label. None: the null condition.
      seed: seed in [0, 2**32); the noise of image i derives from (seed, i).
      batch_size: number of images that each device generates at once.
      inpaint, mask: image to inpaint, and the part to paint; see `inpaint`.
      interpolation: for inpainting: share of the process, in [0, 1] from full noise, in
        which the side-interpolater predicts the hidden tokens from the visible tokens.
        Default: 0.25, or 0 if the network has no side-interpolater.
      repeats: for inpainting: how many times each step is repeated, so that the painted
        part fits the visible part (RePaint, arXiv 2201.09865). Default: 1. Only "ddpm"
        and "ddim" can repeat steps.
      edit: image to edit; see `edit`.
      strength: for editing: noise level of the start, as a share of the process in
        (0, 1]; larger values change the image more. Default: 0.6.
      weak_checkpoint: run of the network of guidance's weak pass. None: the network
        itself.
      weak_step: training step of that network. None: the latest, which is this network
        itself if weak_checkpoint is this run.
      **sampling: settings of config.sampling for this call, such as num_steps=50,
        method="dpm++" or cfg_scale=1.0.

    Returns:
      The job, which generates the images.

    Raises:
      SettingError: an argument is invalid.
    """
    with renamed_in_errors(SAMPLING_ARGUMENTS):
      experiment = self.experiment.with_sampling(sampling)
      guidance = experiment.sampler.guidance  # the sampler checks its arguments
    request = make_request(
      experiment, labels, condition, null, seed=seed, batch_size=batch_size
    )
    check_needed(
      mask=(mask, "inpaint", inpaint),
      interpolation=(interpolation, "inpaint", inpaint),
      repeats=(repeats, "inpaint", inpaint),
      strength=(strength, "edit", edit),
      weak_step=(weak_step, "weak_checkpoint", weak_checkpoint),
    )
    if inpaint is not None and edit is not None:
      raise SettingError("edit", edit, "cannot be combined with inpaint")
    weak = None
    if weak_checkpoint is not None:
      weak = load_weak(
        weak_checkpoint,
        weak_step,
        experiment,
        own_step=self.step,
        own_params=self.params,
      )
    with renamed_in_errors(SAMPLING_ARGUMENTS):
      check_tokens(self.model, guidance, weak.model if weak else None)
    job = SamplingJob(
      experiment,
      self.params,
      self.step,
      self.autoencoder,
      DRAW,
      request,
      generators=self._generators,
      weak=weak,
    )
    if inpaint is not None:
      return with_inpainting(job, inpaint, mask, interpolation, repeats)
    if edit is not None:
      return with_editing(job, edit, strength)
    return job

  def _draw_pictures(
    self, labels: Labels, arguments: dict[str, Any]
  ) -> list[Image.Image]:
    """Draws images as PIL images; raises SettingError if the pipeline draws latents."""
    if not self.draws_pixels:
      raise SettingError(
        "vae",
        None,
        "must be given to decode latents; for arrays, as of a model that was trained "
        "on float images, use draw()",
      )
    return [pictures.to_pil(pixels) for pixels in self.draw(labels, **arguments)]


def _log_flops(job: SamplingJob) -> None:
  """Logs the cost of an image, unless a network of the user's own does not count it."""
  try:
    gflops = job.flops / 1e9
  except SettingError:
    return
  logger.info("an image costs %.4g GFLOPs of the network", gflops)
