"""Encodes images once: python -m mdt_jax.encode --source=… --vae=… --output=DIR

DIR gets ArrayRecord shards of latents and a card, for config.data.source=latents. The
same command goes on after a stop. Several machines share the work: give each the same
command and a folder that all see, with its --process_index and the --process_count, or
with --distributed.

python -m mdt_jax.encode --statistics --output=DIR     mean and deviation by channel
python -m mdt_jax.encode --verify --output=DIR         compares checksums
python -m mdt_jax.encode --reference_batch=FILE.npz --source=…    images for evaluation
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from mdt_jax import cli, sharding
from mdt_jax.atomic import atomic_write, write_json
from mdt_jax.data import latent_writer, latents
from mdt_jax.data.files import open_files
from mdt_jax.data.sources import ImageSource
from mdt_jax.errors import SettingError, check_choice, renamed_in_errors

SOURCE = flags.DEFINE_string(
  "source", None, "Folder of images, .tar file or folder of them, or tfds:NAME."
)
SPLIT = flags.DEFINE_string("split", "train", "Of a data set of TFDS.")
VAE = flags.DEFINE_string("vae", None, "Folder in diffusers' form, or hub id.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the set.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the crops, in pixels.")
DTYPE = flags.DEFINE_string("dtype", "float16", "As stored: float16 or bfloat16.")
COMPUTE_DTYPE = flags.DEFINE_string(
  "compute_dtype", "float32", "Of the VAE: float32 or bfloat16."
)
NUM_SHARDS = flags.DEFINE_integer("num_shards", None, "One for 10,000 images.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images at a time, all devices.")
NUM_THREADS = flags.DEFINE_integer("num_threads", 8, "That read and crop images.")
MAX_UNREADABLE = flags.DEFINE_integer(
  "max_unreadable", 100, "Images that may be left out before the run stops."
)
PROCESS_INDEX = flags.DEFINE_integer(
  "process_index", None, "This process, from 0. None: as --distributed says, or 0."
)
PROCESS_COUNT = flags.DEFINE_integer(
  "process_count", None, "Processes at work. None: as --distributed says, or 1."
)
STATISTICS = flags.DEFINE_bool("statistics", False, "Of the set in --output.")
VERIFY = flags.DEFINE_bool("verify", False, "The set in --output.")
REFERENCE_BATCH = flags.DEFINE_string(
  "reference_batch", None, "Write crops to this .npz (arr_0, arr_1), encode nothing."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 10_000, "Of a reference batch.")

logger = logging.getLogger("mdt_jax")


def main(argv: list[str]) -> None:
  del argv
  looks = not REFERENCE_BATCH.value and (VERIFY.value or STATISTICS.value)
  names = {
    "config.data.path": "--output" if looks else "--source",
    "config.data.max_unreadable": "--max_unreadable",
  }
  with renamed_in_errors(names):
    if REFERENCE_BATCH.value:
      _write_reference_batch(Path(REFERENCE_BATCH.value).expanduser())
    elif looks:
      _look_at(Path(_required("output", OUTPUT.value)).expanduser())
    else:
      _encode()


def _encode() -> None:
  from mdt_jax.pretrained.autoencoder import Autoencoder

  output = Path(_required("output", OUTPUT.value)).expanduser()
  check_choice("--dtype", DTYPE.value, latents.DTYPES)
  compute_dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  check_choice("--compute_dtype", COMPUTE_DTYPE.value, compute_dtypes)
  _check_numbers()
  source = _open_source()
  process_index, process_count = _process()
  devices = jax.local_devices()
  mesh = sharding.make_mesh(devices=devices)
  if BATCH_SIZE.value % len(devices):
    raise SettingError(
      "--batch_size", BATCH_SIZE.value, f"must be divisible by {len(devices)} devices"
    )
  vae = Autoencoder.load(
    _required("vae", VAE.value),
    compute_dtypes[COMPUTE_DTYPE.value],
    sharding.replicated(mesh),
  )
  if IMAGE_SIZE.value % vae.model.downsampling:
    raise SettingError(
      "--image_size", IMAGE_SIZE.value, f"must be divisible by {vae.model.downsampling}"
    )
  card = {
    "format": latents.FORMAT,
    "source": SOURCE.value,
    "split": SPLIT.value,
    "num_source_images": len(source),
    "classes": list(source.files.classes),
    "image_size": IMAGE_SIZE.value,
    "vae": VAE.value,
    "compute_dtype": COMPUTE_DTYPE.value,
    "scaling_factor": vae.model.scaling_factor,
    "shift_factor": vae.model.shift_factor,
    "latent_shape": list(vae.latent_shape(IMAGE_SIZE.value)),
    "dtype": DTYPE.value,
    "num_shards": NUM_SHARDS.value or -(-len(source) // latent_writer.IMAGES_A_SHARD),
  }
  plan = latent_writer.Plan(card, len(source), card["num_shards"])
  if latent_writer.is_finished(plan, output):
    logger.info("nothing to do: %s is finished", output)
    return
  missing, free = latent_writer.check_disk(plan, output)
  logger.info(
    "%d images of %d classes to %d shards: %.2f GB, %.2f GB still to be written, "
    "%.1f GB free",
    len(source),
    len(source.files.classes),
    plan.num_shards,
    plan.num_bytes / 1e9,
    missing / 1e9,
    free / 1e9,
  )
  over_batch = sharding.over_batch(mesh)
  store = jax.jit(lambda *views: jnp.stack(views, axis=1).astype(DTYPE.value))

  def encode_fn(images: np.ndarray) -> jax.Array:
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    placed = (jax.device_put(view, over_batch) for view in (images, mirrored))
    return store(*(vae.moments(view) for view in placed))

  shards = range(process_index, plan.num_shards, process_count)
  total = sum(len(plan.shard_images(shard)) for shard in shards)
  with tqdm.tqdm(total=total, unit="image") as bar:
    finished = latent_writer.encode(
      plan,
      source,
      encode_fn,
      output,
      batch_size=BATCH_SIZE.value,
      num_threads=NUM_THREADS.value,
      process_index=process_index,
      process_count=process_count,
      progress=bar.update,
    )
  if not finished:
    logger.info("this process is done; others are still at work on %s", output)
    return
  card = latents.read_card(output)
  left_out = sum(len(shard["left_out"]) for shard in card["shards"])
  logger.info("%d images in %s, %d left out", card["images"], output, left_out)


def _look_at(output: Path) -> None:
  """Verifies a set, and writes its statistics."""
  count = latents.read_card(output)["images"]
  if VERIFY.value:
    with tqdm.tqdm(total=count, unit="image") as bar:
      latent_writer.verify(output, bar.update)
    logger.info("%d images in %s: every checksum agrees", count, output)
  if STATISTICS.value:
    shape = latents.read_card(output)["latent_shape"]
    source = latents.LatentSource(output, shape[0], shape[-1], MAX_UNREADABLE.value)
    with tqdm.tqdm(total=count, unit="image") as bar:
      found = latent_writer.statistics(source, bar.update)
    path = output / "statistics.json"
    write_json(path, found)
    for name, values in found.items():
      logger.info("%s by channel: %s", name, " ".join(f"{v:.4f}" for v in values))
    logger.info("%s", path)


def _write_reference_batch(path: Path) -> None:
  """Crops, spread evenly over the source, in the form of ADM's reference batches."""
  _check_numbers()
  if path.suffix != ".npz":
    raise SettingError("--reference_batch", str(path), "must end in .npz")
  source = _open_source()
  count = min(NUM_IMAGES.value, len(source))
  indices = np.linspace(0, len(source) - 1, count).round().astype(int)
  images = np.empty((count, *source.image_shape), np.uint8)
  labels = np.empty(count, np.int32)
  row = 0
  for index in map(int, tqdm.tqdm(indices, unit="image")):
    try:
      example = source.load(index)
    except Exception as error:  # Pillow's decoders raise nearly every type.
      source.leave_out(index, error)
      continue
    images[row], labels[row] = example["image"], example["label"]
    row += 1
  with atomic_write(path) as partial, partial.open("wb") as file:
    np.savez(file, images[:row], labels[:row])
  logger.info("%d images of %d pixels: %s", row, IMAGE_SIZE.value, path)


def _open_source() -> ImageSource:
  files = open_files(_required("source", SOURCE.value), SPLIT.value)
  return ImageSource(files, IMAGE_SIZE.value, 3, MAX_UNREADABLE.value)


def _check_numbers() -> None:
  for name in ("image_size", "batch_size", "num_threads", "num_images"):
    if flags.FLAGS[name].value < 1:
      raise SettingError(f"--{name}", flags.FLAGS[name].value, "must be at least 1")
  if MAX_UNREADABLE.value < 0:
    raise SettingError("--max_unreadable", MAX_UNREADABLE.value, "must be at least 0")
  if NUM_SHARDS.value is not None and NUM_SHARDS.value < 1:
    raise SettingError("--num_shards", NUM_SHARDS.value, "must be at least 1")


def _process() -> tuple[int, int]:
  """(index, count) of the processes that share the work."""
  if (PROCESS_INDEX.value is None) != (PROCESS_COUNT.value is None):
    given = "index" if PROCESS_COUNT.value is None else "count"
    missing = "count" if PROCESS_COUNT.value is None else "index"
    raise SettingError(f"--process_{missing}", None, f"goes with --process_{given}")
  if PROCESS_COUNT.value is None:
    return jax.process_index(), jax.process_count()
  if PROCESS_COUNT.value < 1:
    raise SettingError("--process_count", PROCESS_COUNT.value, "must be at least 1")
  if not 0 <= PROCESS_INDEX.value < PROCESS_COUNT.value:
    raise SettingError(
      "--process_index", PROCESS_INDEX.value, f"must lie in [0, {PROCESS_COUNT.value})"
    )
  return PROCESS_INDEX.value, PROCESS_COUNT.value


def _required(name: str, value: str | None) -> str:
  if not value:
    raise SettingError(f"--{name}", value, "must be given")
  return value


if __name__ == "__main__":
  cli.run(main)
