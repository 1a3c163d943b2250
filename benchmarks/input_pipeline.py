"""Compares data loading with the training step: python -m benchmarks.input_pipeline

Measures images per second, each in a process of its own and several times, of:
- the training step of MDTv2-S/2 with batch size 8 on this machine's CPU;
- the loader of latents, from disk and from the page cache, for each number of worker
  processes;
- reading and cropping JPEG images of ImageNet's usual size, with threads;
- encoding images and their mirror images, with a small autoencoder of random weights;
  also with --vae=DIR, and with an autoencoder of Stable Diffusion's size (--sd_size).

The table shows the speed relative to the training step, the CPU time per image in the
main process, which does not depend on the load of the machine, and the peak memory of
the main process and of a worker.

The latent set is synthetic, in ImageNet's format: moments (2, 2, 32, 32, 4) float16.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

WORKERS = flags.DEFINE_list(
  "workers", ["0", "1", "2", "4"], "Numbers of worker processes to compare."
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 20_000, "Images of the latent set, 33 kB each."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Batch size of the loader.")
REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Repeats of each measurement; the table shows medians."
)
SECONDS = flags.DEFINE_float("seconds", 2.0, "Least length of a measurement.")
VAE = flags.DEFINE_string(
  "vae", None, "Also time this autoencoder, a folder or Hugging Face id."
)
SD_SIZE = flags.DEFINE_bool(
  "sd_size", False, "Also time an autoencoder of Stable Diffusion's size."
)
JSON = flags.DEFINE_string("json", None, "File for all measurements.")

LATENT_SHAPE = (32, 32, 4)
NUM_CLASSES = 1000
STEP_BATCH = 8
ENCODE_BATCH = 4
IMAGE_SIZE = 256
JPEG_SIZE = (500, 375)  # the most frequent size in ImageNet
SMALL_WIDTHS = (32, 64, 64, 64)
SD_WIDTHS = (128, 256, 512, 512)


class Timing(NamedTuple):
  """How long to measure: `repeats` windows of at least `seconds`."""

  repeats: int
  seconds: float


class Rate(NamedTuple):
  """Images per second, and CPU seconds of this process per image."""

  images_per_second: float
  cpu_seconds: float


class _Blank:
  """A source of blank images, which take no time to read."""

  def __init__(self, length: int):
    self._length = length
    self.files = self

  def __len__(self) -> int:
    return self._length

  def name(self, index: int) -> str:
    """The file name of an image, as in ImageNet."""
    label = index % NUM_CLASSES
    return f"n{label:08d}/n{label:08d}_{index}.JPEG"

  def load(self, index: int) -> dict[str, Any]:
    """A blank image with its label."""
    return {"image": np.zeros((1, 1, 3), np.uint8), "label": index % NUM_CLASSES}


def write_set(folder: str, num_images: int) -> int:
  """Writes a latent set of noise, and returns the size on disk in bytes."""
  from mdt_jax.data import latent_card, latents
  from mdt_jax.data.latent_set import LatentSet
  from mdt_jax.data.latent_writer import IMAGES_PER_SHARD, write_latents

  rng = np.random.default_rng(0)
  card = {
    "format": latent_card.FORMAT,
    "classes": [f"n{i:08d}" for i in range(NUM_CLASSES)],
    "latent_shape": list(LATENT_SHAPE),
    "dtype": "float16",
  }

  def noise(images: np.ndarray) -> np.ndarray:
    shape = (len(images), 2, 2, *LATENT_SHAPE)
    return rng.standard_normal(shape, np.float32).astype(np.float16)

  num_shards = -(-num_images // IMAGES_PER_SHARD)
  latent_set = LatentSet(Path(folder), card, num_images, num_shards)
  write_latents(latent_set, _Blank(num_images), noise, batch_size=64)
  return sum(shard["bytes"] for shard in latents.read_card(folder)["shards"])


def leave_page_cache(folder: str) -> None:
  """Drops the files of a folder from the page cache, so reads come from disk."""
  for path in Path(folder).iterdir():
    with open(path, "rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: str) -> None:
  """Reads the files of a folder, so that they are in the page cache."""
  for path in Path(folder).iterdir():
    with open(path, "rb") as file:
      while file.read(2**20):
        pass


def time_loader(
  folder: str, num_workers: int, batch_size: int, cached: bool, timing: Timing
) -> list[Rate]:
  """Times the loader of latents.

  Args:
    folder: folder of the latent set.
    num_workers: number of worker processes.
    batch_size: number of images in a batch.
    cached: whether to read from the page cache; otherwise from disk.
    timing: how long to measure.
  """
  from mdt_jax.data import latents, loader

  source = latents.LatentSource(folder, LATENT_SHAPE[0], LATENT_SHAPE[-1], 0)
  batches = loader.create_loader(
    source, seed=0, batch_size=batch_size, flip=True, num_workers=num_workers
  )

  def prepare() -> None:
    (read_all if cached else leave_page_cache)(folder)
    for _ in range(8 + 4 * num_workers):  # skip batches that are already in memory
      next(batches)

  with contextlib.closing(batches):
    return _rates(lambda: next(batches), batch_size, timing, prepare)


def time_step(timing: Timing) -> list[Rate]:
  """Times the training step of MDTv2-S/2: both passes, with unrolled blocks."""
  import jax

  from mdt_jax import recipes, sharding
  from mdt_jax.experiment import build
  from mdt_jax.training import program

  config = recipes.mdtv2("S")
  config.batch_size = STEP_BATCH
  config.model.unroll = -1
  experiment = build(config, devices=jax.devices("cpu")[:1])
  moments = np.zeros((STEP_BATCH, 2, *LATENT_SHAPE), np.float16)
  batch = {"moments": moments, "label": np.arange(STEP_BATCH, dtype=np.int32)}
  kept = experiment.objective.static_choices
  with sharding.use_mesh(experiment.mesh):
    compiled = program.make_program(experiment)
    states = [compiled.init(jax.random.key(0))]

    def step() -> None:
      state, metrics = compiled.step(states.pop(), batch, kept[len(kept) // 2])
      jax.block_until_ready(metrics)
      states.append(state)

    step()  # compiles
    return _rates(step, STEP_BATCH, timing)


def time_reading(folder: str, num_threads: int, timing: Timing) -> list[Rate]:
  """Times reading and cropping JPEG files with threads."""
  from mdt_jax.data.files import open_files
  from mdt_jax.data.images import ImageSource

  source = ImageSource(open_files(folder), IMAGE_SIZE, 3, 0)
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:

    def read() -> None:
      list(pool.map(source.__getitem__, range(len(source))))

    return _rates(read, len(source), timing)


def time_encoding(vae: str | tuple[int, ...], timing: Timing) -> list[Rate]:
  """Times encoding images and their mirror images in float32.

  Args:
    vae: folder or Hugging Face id of an autoencoder; or the widths of an autoencoder
      with random weights.
    timing: how long to measure.
  """
  import jax

  from mdt_jax.models.autoencoder_kl import AutoencoderKL
  from mdt_jax.pretrained.autoencoder import Autoencoder
  from mdt_jax.pretrained.torch_vae import abstract_vae_params

  if isinstance(vae, str):
    autoencoder = Autoencoder.load(vae)
  else:
    model = AutoencoderKL(block_out_channels=vae)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32),
      abstract_vae_params(model),
    )
    autoencoder = Autoencoder(model, jax.device_put(params))
  images = np.random.default_rng(0).integers(
    0, 256, (ENCODE_BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8
  )

  def encode() -> None:
    for views in (images, np.ascontiguousarray(images[:, :, ::-1])):
      jax.block_until_ready(autoencoder.moments(views))

  encode()  # compiles
  return _rates(encode, ENCODE_BATCH, timing)


def _rates(
  work: Callable[[], Any],
  num_images: int,
  timing: Timing,
  prepare: Callable[[], Any] = lambda: None,
) -> list[Rate]:
  """Times `work`, a call of which processes `num_images`; `prepare` is not timed."""
  rates = []
  for _ in range(timing.repeats):
    prepare()
    start, cpu_start, calls = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - start) < timing.seconds:
      work()
      calls += 1
    cpu_seconds = time.process_time() - cpu_start
    images = num_images * calls
    rates.append(Rate(images / passed, cpu_seconds / images))
  return rates


def _measure(work: Callable[..., list[Rate]], arguments: tuple) -> dict[str, Any]:
  """Calls `work` and returns its rates and the peak memory of this process."""
  rates = work(*arguments)
  unit = 1 if platform.system() == "Darwin" else 1024
  peaks = [
    unit * resource.getrusage(who).ru_maxrss
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  return {
    "images_per_second": statistics.median(rate.images_per_second for rate in rates),
    "cpu_seconds": statistics.median(rate.cpu_seconds for rate in rates),
    "repeats": [rate.images_per_second for rate in rates],
    "peak_bytes": peaks[0],
    "peak_bytes_of_a_worker": peaks[1],
  }


def alone(work: Callable[..., list[Rate]], *arguments: Any) -> dict[str, Any]:
  """Runs `_measure` in a new process."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_measure, work, arguments).result()


def write_jpegs(folder: str, count: int = 32) -> None:
  """Writes images of smooth noise, which JPEG compresses about as well as photos."""
  from PIL import Image

  rng = np.random.default_rng(0)
  for i in range(count):
    coarse = rng.integers(0, 256, (47, 63, 3), np.uint8)
    image = Image.fromarray(coarse).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
    held = io.BytesIO()
    image.save(held, "JPEG", quality=95)
    Path(folder, f"{i}.jpg").write_bytes(held.getvalue())


def measure(folder: str) -> Iterator[dict[str, Any]]:
  """Yields the name and the results of each measurement, the training step first."""
  latent_set, jpegs = f"{folder}/latents", f"{folder}/jpegs"
  size = write_set(latent_set, NUM_IMAGES.value)
  print(f"{size / NUM_IMAGES.value:.0f} bytes on disk for each image\n")
  os.mkdir(jpegs)
  write_jpegs(jpegs)
  timing = Timing(REPEATS.value, SECONDS.value)
  yield {"what": "training step of MDTv2-S/2", **alone(time_step, timing)}
  for cached, where in ((False, "disk"), (True, "page cache")):
    for workers in map(int, WORKERS.value):
      found = alone(time_loader, latent_set, workers, BATCH_SIZE.value, cached, timing)
      yield {"what": f"latents from {where}, {workers} workers", **found}
  for threads in (1, 8):
    found = alone(time_reading, jpegs, threads, timing)
    yield {"what": f"JPEG files read and cropped, {threads} threads", **found}
  autoencoders: dict[str, Any] = {"small VAE": SMALL_WIDTHS}
  if SD_SIZE.value:
    autoencoders["VAE of Stable Diffusion's size"] = SD_WIDTHS
  if VAE.value:
    autoencoders[VAE.value] = VAE.value
  for name, vae in autoencoders.items():
    yield {"what": f"encoded, {name}", **alone(time_encoding, vae, timing)}


COLUMNS = ("images/s", "from", "to", "x step", "CPU ms", "MB", "worker MB")


def show(found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
  """Prints each measurement, and returns all measurements."""
  print(f"{'':<40}" + "".join(f"{column:>10}" for column in COLUMNS))
  shown = []
  for entry in found:
    shown.append(entry)
    rate = entry["images_per_second"]
    numbers = (
      f"{rate:.2f}",
      f"{min(entry['repeats']):.2f}",
      f"{max(entry['repeats']):.2f}",
      f"{rate / shown[0]['images_per_second']:.1f}",
      f"{1e3 * entry['cpu_seconds']:.3f}",
      f"{entry['peak_bytes'] / 1e6:.0f}",
      f"{entry['peak_bytes_of_a_worker'] / 1e6:.0f}",
    )
    line = f"{entry['what']:<40}" + "".join(f"{number:>10}" for number in numbers)
    print(line, flush=True)
  return shown


def main(argv: list[str]) -> None:
  del argv
  with tempfile.TemporaryDirectory() as folder:
    found = show(measure(folder))
  if JSON.value:
    result = {
      "date": str(datetime.date.today()),
      "cores": os.cpu_count(),
      "machine": platform.machine(),
      "load": os.getloadavg(),
      "batch_size": BATCH_SIZE.value,
      "measured": found,
    }
    Path(JSON.value).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
