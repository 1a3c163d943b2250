"""The hook that draws pictures: a grid of samples, and their way from noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mdt_jax import sharding
from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath
from mdt_jax.diffusion.time_solvers import TIME_SOLVERS
from mdt_jax.experiment import Experiment
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import generate_batches
from mdt_jax.sampling.conditions import choose_conditions
from mdt_jax.sampling.generator import make_generator
from mdt_jax.training.events import Events
from mdt_jax.training.hooks import Hook
from mdt_jax.types import Params

GRID, STRIPS = "samples", "strips"  # names in TensorBoard, and folders of a workdir
STRIP_IMAGES = 8  # images in a row of the picture of strips


class Pictures(Hook):
  """Draws a grid of `settings.num_samples` images to WORKDIR/samples/step_N.png.

  For the first image of each of the first `settings.num_strips` classes,
  WORKDIR/strips/step_N.png shows what the network predicts at evenly spaced calls of
  the sampler, and then the image of the grid. The grid and the strips are outputs of
  one run of the sampler. The samplers in time have no strips.

  The labels and the noise are the same each time, so that pictures are comparable. A
  latent model without an autoencoder draws a preview of its latents.

  Args:
    experiment: objects of the run.
    folder: folder of the grids; the strips have the folder "strips" beside it.
  """

  what = "picture"

  def __init__(self, experiment: Experiment, folder: AnyPath):
    settings, sampler = experiment.settings, experiment.sampler
    super().__init__(settings.sample_every, settings.num_steps, folder, "png")
    self._settings = settings
    self._autoencoder = experiment.autoencoder
    self._draws_pixels = self._autoencoder is not None or experiment.holds_pixels
    self._network = experiment.model
    self._num_calls = sampler.calls_a_pass
    has_strips = settings.num_strips > 0 and sampler.method not in TIME_SOLVERS
    self._kept = strip_calls(self._num_calls) if has_strips else []
    self._generator = make_generator(experiment.model, sampler, kept_calls=self._kept)
    shards = sharding.batch_shards(experiment.mesh)
    count = -(-settings.num_samples // shards) * shards
    chosen = choose_conditions(
      experiment.model.conditioning,
      count,
      experiment.data_labels,
      open_data=lambda: experiment.source,
    )
    self._labels = chosen.y
    self._captions = list(chosen.captions[: settings.num_samples])

  def _make(
    self, done: int, ema: Mapping[str, Params], stops: Callable[[], bool]
  ) -> dict[str, Image.Image] | None:
    del done, stops  # one call of a compiled function cannot be stopped
    settings, labels = self._settings, self._labels
    (arrays,) = generate_batches(
      self._generator,
      ema[str(settings.sampled_decay)],
      labels,
      seed=settings.seed,
      batch_size=len(labels),
    )
    kept = None
    if self._kept:
      kept, arrays = arrays[:, :-1], arrays[:, -1]
    rows = distinct_rows(self._captions, settings.num_strips)
    images = self._decoded(arrays)
    steps = None if kept is None else self._decoded(_joined(kept[rows]))
    if jax.process_index() > 0:
      return None
    images = images[: settings.num_samples]
    made = {GRID: pictures.make_grid(self._shown(images), self._captions)}
    if steps is not None:
      steps = steps.reshape(len(rows), len(self._kept), *steps.shape[1:])
      found = _joined(np.concatenate([steps, images[rows][:, None]], axis=1))
      captions = self._strip_captions(rows)
      made[STRIPS] = pictures.make_grid(
        self._shown(found), captions, columns=len(self._kept) + 1
      )
    return made

  def _decoded(
    self, latents: Float[np.ndarray, "n H W C"]
  ) -> Float[np.ndarray, "n H W C"]:
    """Decodes latents, if there is a decoder, in batches of the size of the grid."""
    if self._autoencoder is None:
      return latents
    size, found = len(self._labels), []
    for start in range(0, len(latents), size):
      part = latents[start : start + size]
      padded = np.resize(part, (size, *part.shape[1:]))  # repeats the part
      found.append(sharding.fetch(self._autoencoder.decode(padded))[: len(part)])
    return np.concatenate(found)

  def _shown(self, arrays: np.ndarray) -> UInt8[np.ndarray, "n H W C"]:
    """Converts pixels or latents to uint8."""
    if self._draws_pixels:
      return pictures.to_uint8(arrays, self._network)
    return pictures.latent_preview(arrays)

  def _strip_captions(self, rows: Sequence[int]) -> list[str]:
    """The captions of the strips: the class, then the number of each network call."""
    numbers = [f"{call + 1}/{self._num_calls}" for call in self._kept[1:]]
    return [
      text
      for row in rows
      for text in ([self._captions[row], *numbers, "sample"] if self._kept else [])
    ]

  def _write(self, path: AnyPath, made: Mapping[str, Image.Image]) -> None:
    # The grid is written last: a resumed run draws both again if the grid is missing.
    for name in sorted(made, key=lambda name: name == GRID):
      folder = self._folder if name == GRID else self._folder.parent / name
      folder.mkdir(parents=True, exist_ok=True)
      with atomic_write(folder / path.name) as partial:
        made[name].save(partial, format="png")

  def _log(self, done: int, made: Mapping[str, Image.Image], events: Events) -> None:
    images = {name: np.asarray(image)[None] for name, image in made.items()}
    events.write_images(done, images)


def strip_calls(count: int) -> list[int]:
  """Evenly spaced numbers of network calls, from the first; without the last call.

  Args:
    count: number of calls of the sampler. A sampler of one call has none.
  """
  spaced = np.linspace(0, count - 1, STRIP_IMAGES).round().astype(int)
  return sorted({int(call) for call in spaced} - {count - 1})


def distinct_rows(captions: Sequence[str], count: int) -> list[int]:
  """Numbers of `count` images, of different captions as far as there are enough."""
  _, first = np.unique(captions, return_index=True)
  chosen = sorted(first.tolist())
  rest = sorted(set(range(len(captions))) - set(chosen))
  return [*chosen, *rest][:count]


def _joined(arrays: np.ndarray) -> np.ndarray:
  """(n, m, …) -> (n m, …)."""
  return arrays.reshape(-1, *arrays.shape[2:])
