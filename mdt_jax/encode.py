"""Encodes images to latents, once for all runs that train on them.

python -m mdt_jax.encode --source=IMAGES --vae=VAE --output=DIR
python -m mdt_jax.encode --features=LATENTS --output=DIR    latents of another encoder
python -m mdt_jax.encode … --condition=NAME=FILE --captions=FILE    arrays, texts
python -m mdt_jax.encode --statistics --output=DIR     mean and std of each channel
python -m mdt_jax.encode --verify --output=DIR         reads and checks every record
python -m mdt_jax.encode --reference_batch=FILE.npz --source=IMAGES    for evaluation

The first command writes ArrayRecord shards of latents and a card (card.json) to DIR.
Train on them with --config.data.path=DIR. The same command resumes after a stop. To
divide the work among machines, run the same command on each, with an output folder that
all of them see, such as gs://BUCKET/DIR, and with either --process_index and
--process_count, or --distributed.
"""

from __future__ import annotations

import mdt_jax.interrupts  # noqa: F401

from collections.abc import Sequence
from typing import Any

from absl import flags

from mdt_jax import cli
from mdt_jax.data import features
from mdt_jax.data.condition_files import parse_conditions
from mdt_jax.data.image_arrays import CHOICES
from mdt_jax.errors import SettingError
from mdt_jax.sizes import parse_size

SOURCE = flags.DEFINE_string(
  "source",
  None,
  "Images: a folder with one folder for each class, a .tar file, a folder of .tar "
  "files, or tfds:NAME for a data set of TensorFlow Datasets. Needed to encode and for "
  "--reference_batch.",
)
SPLIT = flags.DEFINE_string("split", "train", "Split of a tfds: data set.")
VAE = flags.DEFINE_string(
  "vae",
  None,
  "Autoencoder: a folder in the layout of diffusers, or the id of one on the Hugging "
  "Face hub. Needed to encode.",
)
OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Folder of the set of latents, local or gs://…. Needed except for --reference_batch.",
)
IMAGE_SIZE = flags.DEFINE_string(
  "image_size",
  "256",
  "Height and width of the cropped images, in pixels: one number for a square, or "
  "HEIGHT,WIDTH such as 256,384. Both divisible by the factor of the autoencoder.",
)
IMAGE_BITS = flags.DEFINE_integer(
  "image_bits",
  16,
  "Bits of the values in image files of more than 8 bits, from 8 to 16: the value "
  "2**image_bits - 1 is white.",
)
DTYPE = flags.DEFINE_string(
  "dtype", "float16", "Type of the stored latents: float16 or bfloat16."
)
COMPUTE_DTYPE = flags.DEFINE_string(
  "compute_dtype",
  "float32",
  "Type in which the autoencoder computes: float32 or bfloat16.",
)
NUM_SHARDS = flags.DEFINE_integer(
  "num_shards", None, "Number of shard files. Default: one for every 10,000 images."
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 32, "Images encoded at once, over all devices of this process."
)
NUM_THREADS = flags.DEFINE_integer(
  "num_threads", 8, "Threads that read and crop images."
)
MAX_UNREADABLE = flags.DEFINE_integer(
  "max_unreadable",
  100,
  "Number of unreadable images or records to skip; one more stops the command.",
)
PROCESS_INDEX = flags.DEFINE_integer(
  "process_index",
  None,
  "Number of this process, from 0. Default: from --distributed, or 0.",
)
PROCESS_COUNT = flags.DEFINE_integer(
  "process_count",
  None,
  "Number of processes that encode. Default: from --distributed, or 1.",
)
STATISTICS = flags.DEFINE_bool(
  "statistics",
  False,
  "Write the mean and std of the set in --output to statistics.json. Encode nothing.",
)
VERIFY = flags.DEFINE_bool(
  "verify", False, "Read and check every record of the set in --output. Encode nothing."
)
REFERENCE_BATCH = flags.DEFINE_string(
  "reference_batch",
  None,
  "Write cropped images (arr_0) and labels (arr_1) to this .npz, as the reference of "
  "mdt_jax.evaluate. Encode nothing. Default: encode.",
)
NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 10_000, "Images in the file of --reference_batch."
)
FEATURES = flags.DEFINE_string(
  "features",
  None,
  "Latents that another tool stored, in place of --source and --vae: a folder of .npy "
  "files, or .npy, .npz or .safetensors. Default: encode --source.",
)
LABELS = flags.DEFINE_string(
  "labels",
  None,
  "Labels of --features: a folder of .npy files, or one .npy file. Default: the folder "
  "X_labels beside X_features, else those in the files, else 0.",
)
LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  list(features.LAYOUTS),
  "Axes of --features. Default: as the shape of a square feature says.",
)
KIND = flags.DEFINE_enum(
  "kind",
  "samples",
  list(features.KINDS),
  "What the channels of --features hold: latents, or their mean and then their std or "
  "the logarithm of their variance.",
)
SCALING_FACTOR = flags.DEFINE_float(
  "scaling_factor", 1.0, "Latents are (x - shift_factor) * scaling_factor."
)
SHIFT_FACTOR = flags.DEFINE_float("shift_factor", 0.0, "See --scaling_factor.")
SCALED = flags.DEFINE_bool(
  "scaled",
  True,
  "Whether --features are shifted and scaled already; --noscaled does it now.",
)
STANDARDIZE = flags.DEFINE_bool(
  "standardize",
  False,
  "Shift and scale each channel of --features to mean 0 and std 1.",
)
CONDITION = flags.DEFINE_string(
  "condition",
  None,
  "Arrays of each image to store beside its latents: NAME=FILE, or several joined by "
  "commas. FILE is an .npz, .safetensors or .npy file, a folder of .npy files, or a "
  "Python function module:function. Default: none.",
)
CONDITION_MISSING = flags.DEFINE_enum(
  "condition_missing",
  "refuse",
  list(CHOICES),
  "Images without an array of --condition, or with one that has another shape or is "
  "not finite: refuse the data, or leave these images out.",
)
CAPTIONS = flags.DEFINE_string(
  "captions",
  None,
  "Captions to store for display: a .json file of texts by name, or a .txt or .tsv "
  "file of lines NAME, tab, TEXT. Default: none.",
)
_EXAMPLES = {"source": "IMAGES", "vae": "VAE_FOLDER", "output": "latents/imagenet256"}
# Flags that would have no effect on the set: without --features, and with it.
_OF_FEATURES = (LABELS, LAYOUT, KIND, SCALING_FACTOR, SHIFT_FACTOR, SCALED, STANDARDIZE)
_OF_IMAGES = (SOURCE, VAE, SPLIT, IMAGE_SIZE, IMAGE_BITS, COMPUTE_DTYPE)
_OF_ENCODING = (CONDITION, CONDITION_MISSING, CAPTIONS)


def main(argv: Sequence[str]) -> None:
  del argv
  _refuse_flags_without_effect()
  from mdt_jax.pretrained import encoding  # slow to import, not needed for --help

  if REFERENCE_BATCH.value:
    encoding.write_reference_batch(
      REFERENCE_BATCH.value,
      _required(SOURCE),
      split=SPLIT.value,
      image_size=parse_size("image_size", IMAGE_SIZE.value or ""),
      num_images=NUM_IMAGES.value,
      max_unreadable=MAX_UNREADABLE.value,
      image_bits=IMAGE_BITS.value,
    )
  elif VERIFY.value or STATISTICS.value:
    output = _required(OUTPUT)
    if VERIFY.value:
      encoding.verify(output)
    if STATISTICS.value:
      encoding.write_statistics(output, MAX_UNREADABLE.value)
  elif FEATURES.value:
    _import_features()
  else:
    encoding.encode_images(
      _required(SOURCE),
      _required(OUTPUT),
      vae=_required(VAE),
      split=SPLIT.value,
      image_size=parse_size("image_size", IMAGE_SIZE.value or ""),
      dtype=DTYPE.value,
      compute_dtype=COMPUTE_DTYPE.value,
      num_shards=NUM_SHARDS.value,
      batch_size=BATCH_SIZE.value,
      num_threads=NUM_THREADS.value,
      max_unreadable=MAX_UNREADABLE.value,
      image_bits=IMAGE_BITS.value,
      process_index=PROCESS_INDEX.value,
      process_count=PROCESS_COUNT.value,
      **_condition_arguments(),
    )


def _refuse_flags_without_effect() -> None:
  """Refuses a flag that the command would ignore, if its value is not its default."""
  checked: list[tuple[flags.FlagHolder[Any], str]]
  if FEATURES.value:
    checked = [(flag, "must be left out with --features") for flag in _OF_IMAGES]
  else:
    checked = [(flag, "needs --features") for flag in _OF_FEATURES]
  if not REFERENCE_BATCH.value:
    checked.append((NUM_IMAGES, "needs --reference_batch"))
  for other in (REFERENCE_BATCH, VERIFY, STATISTICS):
    if other.value:
      problem = f"must be left out with --{other.name}, which encodes nothing"
      checked += [(flag, problem) for flag in _OF_ENCODING]
  if not CONDITION.value:
    checked.append((CONDITION_MISSING, "needs --condition"))
  for flag, problem in checked:
    if flag.value != flag.default:
      raise SettingError(flag.name, flag.value, problem)


def _import_features() -> None:
  from mdt_jax.data import feature_import

  feature_import.import_features(
    FEATURES.value or "",
    _required(OUTPUT),
    labels=LABELS.value,
    convention=features.Convention(
      layout=LAYOUT.value,
      kind=KIND.value,
      scaling_factor=SCALING_FACTOR.value,
      shift_factor=SHIFT_FACTOR.value,
      scaled=SCALED.value,
    ),
    standardize=STANDARDIZE.value,
    dtype=DTYPE.value,
    num_shards=NUM_SHARDS.value,
    num_threads=NUM_THREADS.value,
    max_unreadable=MAX_UNREADABLE.value,
    process_index=PROCESS_INDEX.value,
    process_count=PROCESS_COUNT.value,
    **_condition_arguments(),
  )


def _condition_arguments() -> dict[str, Any]:
  """Returns the arguments of the flags about arrays and captions."""
  text = CONDITION.value
  return {
    "condition": {} if text is None else parse_conditions(text),
    "captions": CAPTIONS.value,
    "condition_missing": CONDITION_MISSING.value,
  }


def _required(flag: flags.FlagHolder[str | None]) -> str:
  return cli.required_value(flag, _EXAMPLES[flag.name])


if __name__ == "__main__":
  cli.run(main)
