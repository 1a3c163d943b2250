"""Encodes the images of a data set to a latent set, with a pretrained autoencoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, UInt8

from mdt_jax import sharding
from mdt_jax.atomic import write_json
from mdt_jax.buckets import is_bucket
from mdt_jax.data import file_names, latent_card, latents, reference_batches
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.files import open_files
from mdt_jax.data.image_arrays import Conditions, open_image_arrays
from mdt_jax.data.images import ImageSource
from mdt_jax.data.latent_set import LatentSet
from mdt_jax.data.latent_writer import IMAGES_PER_SHARD, this_process, write_latents
from mdt_jax.errors import SettingError, check_choice, check_range, renamed_in_errors
from mdt_jax.logs import counted, logger
from mdt_jax.paths import absolute, any_path, output_file, output_folder
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.sizes import Size, describe_size, height_width, to_size
from mdt_jax.types import Array

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
STATISTICS = "statistics.json"
# Bounds far above any use, so that a mistyped value does not use up the memory.
MAX_IMAGES, MAX_IMAGE_SIZE = 100_000_000, 16_384
MAX_BATCH_SIZE, MAX_THREADS = 65_536, 1_024
# Setting in an error of an inner function -> argument of the functions below.
_ARGUMENTS = {
  "config.data.max_unreadable": "max_unreadable",
  "--dtype": "dtype",
  "--output": "output",
  "--reference_batch": "reference_batch",
  "--vae": "vae",
}


@renamed_in_errors({**_ARGUMENTS, "config.data.path": "source"})
def encode_images(
  source: str,
  output: str | os.PathLike[str],
  *,
  vae: str,
  split: str = "train",
  image_size: Size = 256,
  dtype: str = "float16",
  compute_dtype: str = "float32",
  num_shards: int | None = None,
  batch_size: int = 32,
  num_threads: int = 8,
  max_unreadable: int = 100,
  image_bits: int = 16,
  process_index: int | None = None,
  process_count: int | None = None,
  condition: Conditions | None = None,
  captions: str | os.PathLike[str] | None = None,
  condition_missing: str = "refuse",
) -> bool:
  """Encodes images and their mirror images into a latent set.

  If a call is interrupted, the same call resumes at the first unfinished shard. Several
  processes write one set together if each calls this function with its
  `process_index`.

  Args:
    source: folder of images, .tar file, folder of .tar files, or "tfds:NAME".
    output: folder of the latent set; see `data.latents`.
    vae: autoencoder, as a folder in diffusers' format or a Hugging Face hub id.
    split: split of a TFDS data set.
    image_size: height and width of the centre crops in pixels: one number for a square,
      or (height, width).
    dtype: dtype of the stored latents, "float16" or "bfloat16".
    compute_dtype: compute dtype of the autoencoder, "float32" or "bfloat16".
    num_shards: number of shards of the set; None for one per 10,000 images.
    batch_size: number of images per batch, over all devices of this process.
    num_threads: number of threads that read and crop images.
    max_unreadable: largest accepted number of unreadable images, which are left out.
    image_bits: bits of the values in image files of more than 8 bits.
    process_index, process_count: index of this process, from 0, and number of processes
      that write the set; None for those of JAX.
    condition: name of an array -> file, folder, "module:function" or function (image
      (H, W, 3) uint8, name) -> array; see docs/data.md. The set holds these arrays of
      each image. None for none.
    captions: file of captions, which the set holds for display; None for none.
    condition_missing: "refuse" or "leave_out": images whose array is missing, has
      another shape than the first, or is not finite.

  Returns:
    Whether the set is finished; False if other processes still write shards.

  Raises:
    SettingError: an argument is out of range, no images or no autoencoder are found,
      an array of a condition cannot be used, the devices have too little memory, or
      writing fails; see `latent_writer.write_latents`.
  """
  output = output_folder("output", output)
  check_choice("dtype", dtype, latent_card.DTYPES)
  check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
  check_range("batch_size", batch_size, 1, MAX_BATCH_SIZE)
  check_range("num_threads", num_threads, 1, MAX_THREADS)
  images = _open_images(source, split, image_size, max_unreadable, image_bits)
  check_range("num_shards", num_shards, 1, len(images))
  index, count = this_process(process_index, process_count)
  arrays = open_image_arrays(
    condition or {},
    captions,
    condition_missing,
    [images.files.name(i) for i in range(len(images))] if condition or captions else [],
    lambda i: images.load(i)["image"],
  )
  devices = jax.local_devices()
  mesh = sharding.make_mesh(devices=devices)
  if batch_size % len(devices):
    raise SettingError(
      "batch_size", batch_size, f"must be divisible by {len(devices)} devices"
    )
  autoencoder = Autoencoder.load(
    vae, COMPUTE_DTYPES[compute_dtype], sharding.replicated(mesh)
  )
  model = autoencoder.model
  if any(side % model.downsampling for side in height_width(image_size)):
    raise SettingError(
      "image_size", image_size, f"must be divisible by {model.downsampling}"
    )
  num_shards = num_shards or -(-len(images) // IMAGES_PER_SHARD)
  size = to_size(image_size)
  card = {
    "format": latent_card.format_name(arrays is not None),
    "source": file_names.from_path(source),
    "split": split,
    "num_source_images": len(images),
    "classes": list(images.files.classes),
    "image_size": size if isinstance(size, int) else list(size),
    **({} if image_bits == 16 else {"image_bits": image_bits}),
    "vae": file_names.from_path(vae),
    "compute_dtype": compute_dtype,
    # Statistics by channel are left out of the card if there are none.
    **{name: v for name, v in autoencoder.scales().items() if v is not None},
    "latent_shape": list(autoencoder.latent_shape(image_size)),
    "dtype": dtype,
    "num_shards": num_shards,
    **({} if arrays is None else arrays.card),
  }
  latent_set = LatentSet(output, card, num_images=len(images), num_shards=num_shards)
  if latent_set.is_finished():
    logger.info("nothing to do: %s is finished", latent_set.folder)
    return True
  _log_sizes(latent_set, images)
  shards = range(index, num_shards, count)
  total = sum(len(latent_set.shard_images(shard)) for shard in shards)
  with tqdm.tqdm(total=total, unit="image") as bar:
    try:
      finished = write_latents(
        latent_set,
        images,
        _make_encode_fn(autoencoder, mesh, dtype),
        batch_size=batch_size,
        num_threads=num_threads,
        process_index=index,
        process_count=count,
        progress=bar.update,
        arrays=arrays,
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise SettingError(
        "batch_size", batch_size, "needs more memory than the devices have"
      ) from None
  if finished:
    entries = latents.read_card(latent_set.folder)["shards"]
    written = sum(entry["images"] for entry in entries)
    left_out = sum(len(entry["left_out"]) for entry in entries)
    images_written = counted(written, "image")
    logger.info("%s in %s, %d left out", images_written, latent_set.folder, left_out)
  else:
    logger.info(
      "this process is done; other processes still write %s", latent_set.folder
    )
  return finished


@renamed_in_errors({**_ARGUMENTS, "config.data.path": "output"})
def verify(output: str | os.PathLike[str]) -> int:
  """Reads and checks all records of a latent set; see `latents.verify`.

  Args:
    output: folder of the latent set.

  Returns:
    The number of images.

  Raises:
    SettingError: a shard or a record is missing or damaged; the message names the first
      one.
  """
  output = any_path("output", output)
  with tqdm.tqdm(total=latents.read_card(output)["images"], unit="image") as bar:
    count = latents.verify(output, bar.update)
  logger.info("%s in %s: every checksum agrees", counted(count, "image"), output)
  return count


@renamed_in_errors({**_ARGUMENTS, "config.data.path": "output"})
def write_statistics(
  output: str | os.PathLike[str], max_unreadable: int = 100
) -> latents.ChannelStatistics:
  """Writes the channel statistics of a latent set to statistics.json in its folder.

  Args:
    output: folder of the latent set.
    max_unreadable: largest accepted number of unreadable records.

  Returns:
    Mean and standard deviation per channel.

  Raises:
    SettingError: the folder holds no latent set, or too many records are unreadable.
  """
  folder = absolute(output) if is_bucket(output) else Path(output)
  output = output_file("output", folder / STATISTICS).parent
  source = latents.open_set(output, max_unreadable)
  with tqdm.tqdm(total=len(source), unit="image") as bar:
    readable = source.readable(bar.update)
    found = latents.channel_statistics(example["views"] for example in readable)
  # statistics.json calls the standard deviation "deviation".
  values = {"mean": found.mean.tolist(), "deviation": found.std.tolist()}
  write_json(output / STATISTICS, values)
  for name, numbers in found._asdict().items():
    logger.info("%s by channel: %s", name, " ".join(f"{v:.4f}" for v in numbers))
  logger.info("%s", output / STATISTICS)
  return found


@renamed_in_errors({**_ARGUMENTS, "config.data.path": "source"})
def write_reference_batch(
  reference_batch: str | os.PathLike[str],
  source: str,
  *,
  split: str = "train",
  image_size: Size = 256,
  num_images: int = 10_000,
  max_unreadable: int = 100,
  image_bits: int = 16,
) -> int:
  """Writes evenly spaced images of a source to an .npz file for evaluation.

  Args:
    reference_batch: path of the .npz file; see `data.reference_batches`.
    source: folder of images, .tar file, folder of .tar files, or "tfds:NAME".
    split: split of a TFDS data set.
    image_size: height and width of the centre crops in pixels: one number for a square,
      or (height, width).
    num_images: number of images to select; all images if the source has fewer.
    max_unreadable: largest accepted number of unreadable images, which are left out.
    image_bits: bits of the values in image files of more than 8 bits.

  Returns:
    The number of images written.

  Raises:
    SettingError: an argument is out of range, no images are found, or too many images
      are unreadable.
  """
  check_range("num_images", num_images, 1, MAX_IMAGES)
  path = output_file("reference_batch", reference_batch)
  images = _open_images(source, split, image_size, max_unreadable, image_bits)
  with tqdm.tqdm(total=min(num_images, len(images)), unit="image") as bar:
    count = reference_batches.write_reference_batch(
      path, images, num_images, bar.update
    )
  sides = describe_size(image_size)
  logger.info("%s of %s pixels: %s", counted(count, "image"), sides, path)
  return count


def _make_encode_fn(
  autoencoder: Autoencoder, mesh: jax.sharding.Mesh, dtype: str
) -> Callable[[UInt8[np.ndarray, "B H W 3"]], Float[Array, "B 2 2 h w C"]]:
  """Builds the function that encodes images and mirror images on all devices."""
  over_batch = sharding.over_batch(mesh)
  store = jax.jit(lambda *views: jnp.stack(views, axis=1).astype(dtype))

  def encode_fn(images: np.ndarray) -> Array:
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    placed = (jax.device_put(view, over_batch) for view in (images, mirrored))
    return store(*(autoencoder.moments(view) for view in placed))

  return encode_fn


def _log_sizes(latent_set: LatentSet, images: ImageSource) -> None:
  """Logs the size of the set; raises SettingError if it does not fit on the disk."""
  missing, free = latent_set.check_disk()
  held = DataLabels.of(images)
  held.warn_of_order()
  logger.info(
    "%s in %s; to %d shards: %.2f GB, %.2f GB still to be written, %.1f GB free%s",
    counted(len(images), "image"),
    held.describe(),
    latent_set.num_shards,
    latent_set.num_bytes / 1e9,
    missing / 1e9,
    free / 1e9,
    "" if isinstance(latent_set.folder, Path) else " for temporary files",
  )


def _open_images(
  source: str, split: str, image_size: Size, max_unreadable: int, image_bits: int
) -> ImageSource:
  """Opens RGB images; raises SettingError if an argument is out of range."""
  for side in height_width(image_size, "image_size"):
    if not 1 <= side <= MAX_IMAGE_SIZE:
      raise SettingError(
        "image_size", image_size, f"must lie in [1, {MAX_IMAGE_SIZE:,}]"
      )
  check_range("max_unreadable", max_unreadable, 0, MAX_IMAGES)
  check_range("image_bits", image_bits, 8, 16)
  files = open_files(source, split)
  return ImageSource(files, image_size, 3, max_unreadable, image_bits)
