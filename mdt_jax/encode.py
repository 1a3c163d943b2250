"""Encodes images once: python -m mdt_jax.encode --source=… --vae=… --output=DIR

Writes ArrayRecord shards of latents and a card to DIR, for config.data.source=latents.
Repeat the command to go on after a stop. To share the work among machines, run the same
command on each, with an output folder that all of them see, and either --process_index
and --process_count, or --distributed.

python -m mdt_jax.encode --statistics --output=DIR     mean and std by channel
python -m mdt_jax.encode --verify --output=DIR         reads and checks every record
python -m mdt_jax.encode --reference_batch=FILE.npz --source=…    images for evaluation
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from mdt_jax import cli
from mdt_jax.errors import SettingError

SOURCE = flags.DEFINE_string(
  "source", None, "Folder of images, .tar file or folder of them, or tfds:NAME."
)
SPLIT = flags.DEFINE_string("split", "train", "Split of a TFDS data set.")
VAE = flags.DEFINE_string(
  "vae", None, "Autoencoder: folder in the form of diffusers, or hub id."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the set of latents.")
IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", 256, "Height and width of the crops, in pixels."
)
DTYPE = flags.DEFINE_string(
  "dtype", "float16", "Type of the stored latents: float16 or bfloat16."
)
COMPUTE_DTYPE = flags.DEFINE_string(
  "compute_dtype",
  "float32",
  "Type of the autoencoder's computation: float32, bfloat16.",
)
NUM_SHARDS = flags.DEFINE_integer(
  "num_shards", None, "Shards of the set. None: one per 10,000 images."
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 32, "Images in a batch, over all devices of this process."
)
NUM_THREADS = flags.DEFINE_integer(
  "num_threads", 8, "Threads that read and crop images."
)
MAX_UNREADABLE = flags.DEFINE_integer(
  "max_unreadable", 100, "Unreadable images or records to leave out before stopping."
)
PROCESS_INDEX = flags.DEFINE_integer(
  "process_index", None, "This process, from 0. None: as --distributed says, or 0."
)
PROCESS_COUNT = flags.DEFINE_integer(
  "process_count", None, "Processes at work. None: as --distributed says, or 1."
)
STATISTICS = flags.DEFINE_bool(
  "statistics", False, "Write mean and std of the set in --output, and encode nothing."
)
VERIFY = flags.DEFINE_bool(
  "verify", False, "Check every record of the set in --output, and encode nothing."
)
REFERENCE_BATCH = flags.DEFINE_string(
  "reference_batch", None, "Write crops to this .npz (arr_0, arr_1), encode nothing."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 10_000, "Images of a reference batch.")


def main(argv: Sequence[str]) -> None:
  del argv
  from mdt_jax.pretrained import encoding  # imports JAX, not needed for --help

  if REFERENCE_BATCH.value:
    encoding.write_reference_batch(
      REFERENCE_BATCH.value,
      _required(SOURCE),
      split=SPLIT.value,
      image_size=IMAGE_SIZE.value,
      num_images=NUM_IMAGES.value,
      max_unreadable=MAX_UNREADABLE.value,
    )
  elif VERIFY.value or STATISTICS.value:
    output = _required(OUTPUT)
    if VERIFY.value:
      encoding.verify(output)
    if STATISTICS.value:
      encoding.write_statistics(output, MAX_UNREADABLE.value)
  else:
    encoding.encode_images(
      _required(SOURCE),
      _required(OUTPUT),
      vae=_required(VAE),
      split=SPLIT.value,
      image_size=IMAGE_SIZE.value,
      dtype=DTYPE.value,
      compute_dtype=COMPUTE_DTYPE.value,
      num_shards=NUM_SHARDS.value,
      batch_size=BATCH_SIZE.value,
      num_threads=NUM_THREADS.value,
      max_unreadable=MAX_UNREADABLE.value,
      process_index=PROCESS_INDEX.value,
      process_count=PROCESS_COUNT.value,
    )


def _required(flag: flags.FlagHolder[str | None]) -> str:
  if not flag.value:
    raise SettingError(f"--{flag.name}", flag.value, "must be given")
  return flag.value


if __name__ == "__main__":
  cli.run(main)
