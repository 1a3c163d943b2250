"""Draws for the page: checked requests in, pictures and progress out.

The engine knows nothing of the page. Several threads may use one engine; the network
calls of their pictures take turns.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8

from mdt_jax.demo.commands import Source, command_line, python_code
from mdt_jax.diffusion.loops import METHODS, check_holds
from mdt_jax.diffusion.time_solvers import TIME_SOLVERS
from mdt_jax.errors import SettingError, check_choice, check_range
from mdt_jax.models.conditions import LabelCondition
from mdt_jax.sampling import pictures
from mdt_jax.sampling.job import SamplingJob
from mdt_jax.sampling.labels import imagenet_classes
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.sampling.stepwise import Step, Stepper

MAX_IMAGES = 16  # of one request
MAX_STEPS = 250
MAX_SCALE = 20.0  # of guidance
STAGES = 8  # pictures of a denoising strip
DEFAULT_METHOD = "heun"  # where the sampler of the run has no separate steps
EXAMPLE_SECONDS = 15  # estimated, that drawing the example may take
ANY_CLASS = "any class"


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a user chooses for a picture.

  Attributes:
    labels: classes, in turn; None for no class.
    count: number of pictures.
    seed: seed in [0, 2**32).
    steps: number of sampling steps.
    method: name of the sampler.
    scale, power: guidance scale, and power of its schedule.
  """

  labels: tuple[int | None, ...]
  count: int
  seed: int
  steps: int
  method: str
  scale: float
  power: float


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
  """Pictures that are being drawn.

  Attributes:
    step: number of network calls so far.
    steps: number of network calls in all.
    images: (N, H, W, C) uint8, as the network predicts them now; None between the
      stages of the strip.
    stages: the predictions so far, one array (N, H, W, C) for each stage of the strip.
    is_done: whether `images` are the finished pictures.
  """

  step: int
  steps: int
  images: UInt8[np.ndarray, "N H W C"] | None
  stages: tuple[UInt8[np.ndarray, "N H W C"], ...]
  is_done: bool = False


class Engine:
  """Draws the pictures of the page with one pipeline, on one device.

  Args:
    pipeline: the trained network.
    source: where the pipeline comes from, for the code that the page shows.

  Attributes:
    example: a drawn picture, {"pixels": (H, W, C) uint8, "label"}; None until `warm_up`
      has drawn it.

  Raises:
    SettingError: setting "checkpoint": the network is not conditioned on classes.
  """

  def __init__(self, pipeline: Pipeline, source: Source):
    if not isinstance(pipeline.model.conditioning, LabelCondition):
      name = type(pipeline.model.conditioning).__name__
      accepted = f"must hold a network of class labels; this one has a {name}"
      raise SettingError("checkpoint", source.checkpoint, accepted)
    self.pipeline = pipeline
    self.source = source
    self.stepper = Stepper(unroll=1)  # compiles fast
    self.example: dict[str, Any] | None = None
    self._turn = threading.Lock()

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a picture that the page shows."""
    height, width, channels = self.pipeline.image_shape
    return height, width, 3 if channels >= 3 else 1

  @property
  def takes_pictures(self) -> bool:
    """Whether the engine can inpaint, edit and look inside an uploaded picture."""
    return self.pipeline.draws_pixels

  @property
  def is_guided(self) -> bool:
    """Whether the network was trained for classifier-free guidance."""
    return self.pipeline.has_null_label

  def describe(self) -> str:
    """Describes the network in one line."""
    text = repr(self.pipeline)
    return text.removeprefix("Pipeline(").removesuffix(")")

  def classes(self) -> list[tuple[str, int | None]]:
    """(name, label) of each class, and of no class if the network can draw it."""
    pipeline = self.pipeline
    held, count = pipeline.experiment.data_labels, pipeline.model.num_classes
    names = imagenet_classes()
    if held is not None and (len(held.names) or count != len(names)):
      found = [(held.caption(label), label) for label in held.labels.tolist()]
    elif count == len(names):
      found = [(f"{i} {', '.join(all_of)}", i) for i, all_of in enumerate(names)]
    else:
      found = [(str(label), label) for label in range(count)]
    none: list[tuple[str, int | None]] = [(ANY_CLASS, None)]
    return [*found, *(none if pipeline.has_null_label else [])]

  def methods(self, task: str = "draw") -> list[str]:
    """Names of the samplers whose steps the page can show.

    Args:
      task: "draw", "edit" or "inpaint".
    """
    found = []
    for method in METHODS:
      try:
        if method in TIME_SOLVERS:
          continue
        if task == "inpaint":
          check_holds(method)
        changes = {"method": method, "arguments": {}, "num_steps": 2}
        _ = self.pipeline.experiment.with_sampling(changes).sampler
      except SettingError:
        continue
      found.append(method)
    return found

  def defaults(self) -> Settings:
    """The settings of the run; guidance 1 if the network has no null label."""
    sampling, found = self.pipeline.experiment.settings.sampling, self.methods()
    method = sampling.method if sampling.method in found else DEFAULT_METHOD
    return Settings(
      labels=(self.classes()[0][1],),
      count=4,
      seed=0,
      steps=min(sampling.num_steps, self.max_steps),
      method=method,
      scale=sampling.cfg_scale if self.is_guided else 1.0,
      power=sampling.cfg_power,
    )

  @property
  def max_steps(self) -> int:
    """Largest number of steps that a user may choose."""
    diffusion = self.pipeline.experiment.settings.diffusion
    return min(MAX_STEPS, diffusion.num_timesteps)

  def arguments(self, settings: Settings) -> dict[str, Any]:
    """The arguments of `Pipeline.job` for some settings, without labels and images.

    Raises:
      SettingError: a setting is out of range.
    """
    check_range("pictures", settings.count, 1, MAX_IMAGES)
    check_range("steps", settings.steps, 1, self.max_steps)
    check_range("guidance", settings.scale, 0, MAX_SCALE)
    check_range("power", settings.power, 0, MAX_SCALE)
    check_choice("sampler", settings.method, self.methods())
    sampling = self.pipeline.experiment.settings.sampling
    arguments: dict[str, Any] = {
      "seed": settings.seed,
      "method": settings.method,
      "num_steps": settings.steps,
      "cfg_scale": settings.scale,
      "cfg_power": settings.power,
    }
    if sampling.arguments and settings.method != sampling.method:
      arguments["arguments"] = {}
    return arguments

  def labels(self, settings: Settings) -> list[int | None]:
    """The label of each picture.

    Raises:
      SettingError: there is no label.
    """
    if not settings.labels:
      raise SettingError("class", "none", "choose at least one class")
    labels = settings.labels
    return [labels[i % len(labels)] for i in range(settings.count)]

  def scales(self, settings: Settings, count: int = 60) -> Float[np.ndarray, "count"]:
    """The guidance scale over sampling, from noise to picture."""
    job = self._job(settings, {})
    guidance = job.experiment.sampler.guidance
    shares = np.linspace(1, 0, count)
    times = guidance.clean_time + shares * (
      guidance.num_timesteps - guidance.clean_time
    )
    if guidance.scale == 1:
      return np.ones(count, np.float32)
    return np.asarray(guidance.scale_at(jnp.asarray(times, jnp.float32)))

  def warm_up(self) -> None:
    """Compiles the default settings, and draws `example` if that takes seconds."""
    settings = self.defaults()
    one_step = dataclasses.replace(settings, steps=1)
    list(self.draw(one_step))
    start = time.monotonic()
    list(self.draw(one_step))  # does not compile
    if (time.monotonic() - start) * settings.steps > EXAMPLE_SECONDS:
      return
    for at in self.draw(settings):
      if at.is_done and at.images is not None:
        self.example = {"pixels": at.images[0], "label": settings.labels[0]}

  def draw(self, settings: Settings) -> Iterator[Progress]:
    """Draws pictures from noise.

    Raises:
      SettingError: a setting is out of range.
    """
    return self._run(self._job(settings, {}))

  def inpaint(
    self,
    settings: Settings,
    picture: UInt8[np.ndarray, "H W C"],
    hidden: Bool[np.ndarray, "H W"],
    interpolation: float | None = None,
  ) -> Iterator[Progress]:
    """Paints the hidden part of a picture.

    Args:
      settings: what the user chose.
      picture: the picture, of the network's size.
      hidden: True where the picture is painted.
      interpolation: see `Pipeline.job`.

    Raises:
      SettingError: a setting is out of range, or all or nothing is hidden.
    """
    extra = self.inpainting(picture, hidden, interpolation)
    return self._run(self._job(settings, extra))

  def edit(
    self, settings: Settings, picture: UInt8[np.ndarray, "H W C"], strength: float
  ) -> Iterator[Progress]:
    """Turns a picture into one of another class.

    Raises:
      SettingError: a setting is out of range.
    """
    return self._run(self._job(settings, {"edit": picture, "strength": strength}))

  def inpainting(
    self,
    picture: UInt8[np.ndarray, "H W C"],
    hidden: Bool[np.ndarray, "H W"],
    interpolation: float | None,
  ) -> dict[str, Any]:
    """The arguments of `Pipeline.job` that inpainting adds."""
    if not hidden.any():
      accepted = "brush over the part to paint"
      raise SettingError("mask", "no pixel", accepted)
    if hidden.all():
      accepted = "leave a part of the picture without brush strokes"
      raise SettingError("mask", "all pixels", accepted)
    extra: dict[str, Any] = {"inpaint": picture, "mask": hidden}
    if interpolation is not None and self.pipeline.model.takes_mask:
      extra["interpolation"] = interpolation
    return extra

  def code(
    self, settings: Settings, extra: Mapping[str, Any] | None = None
  ) -> tuple[str, str]:
    """The command line and the Python that draw the same pictures.

    Args:
      settings: what the user chose.
      extra: further arguments, with the names of files in the place of pictures.
    """
    arguments = {**self.arguments(settings), **(extra or {})}
    labels = self.labels(settings)
    return (
      command_line(self.source, labels, arguments),
      python_code(self.source, labels, arguments),
    )

  def _job(self, settings: Settings, extra: Mapping[str, Any]) -> SamplingJob:
    labels = self.labels(settings)
    arguments = self.arguments(settings)
    return self.pipeline.job(labels, batch_size=len(labels), **arguments, **extra)

  def _run(self, job: SamplingJob) -> Iterator[Progress]:
    """Runs the one block of a job."""
    stages: list[np.ndarray] = []
    steps = self.stepper.run(job)
    while True:
      with self._turn:  # not held at a `yield`, where the page may leave the loop
        try:
          step = next(steps)
        except StopIteration as stop:
          images = job.keep_visible(0, self._decode(job, stop.value))
          calls = self._calls
          break
        self._calls = step.calls
        shown = None
        if _is_stage(step):
          shown = self._decode(job, step.x0)
          stages.append(shown)
        else:
          jax.block_until_ready(step.x0)  # so that others take their turn in time
      yield Progress(step.call, step.calls, shown, tuple(stages))
    images = self._as_pixels(images)
    yield Progress(calls, calls, images, (*stages[:-1], images), is_done=True)

  def show(self, latents: Float[Any, "N H W C"]) -> UInt8[np.ndarray, "N H W C"]:
    """Turns latents or floats in [-1, 1] into pictures."""
    return self._decode(self._job(self.defaults(), {}), latents)

  def _decode(self, job: SamplingJob, latents: Any) -> UInt8[np.ndarray, "N H W C"]:
    return self._as_pixels(self.stepper.decode(job, latents))

  @staticmethod
  def _as_pixels(images: np.ndarray) -> UInt8[np.ndarray, "N H W C"]:
    """Pixels as they are; latents in false colours."""
    is_pixels = images.dtype == np.uint8
    return images if is_pixels else pictures.latent_preview(images)


def _is_stage(step: Step) -> bool:
  """Whether a step is a stage of the denoising strip; the last step always is."""
  before = (step.call - 1) * STAGES // step.calls
  return step.call * STAGES // step.calls > before
