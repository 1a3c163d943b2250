"""Imports stored features into a latent set, on which training reads them."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import tqdm

from mdt_jax.buckets import is_bucket
from mdt_jax.data import file_names, latent_card
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.data.features import Convention, FeatureSource, open_features
from mdt_jax.data.image_arrays import Conditions, open_image_arrays
from mdt_jax.data.latent_set import LatentSet
from mdt_jax.data.latent_writer import IMAGES_PER_SHARD, this_process, write_latents
from mdt_jax.data.latents import LatentSource, channel_statistics, open_set
from mdt_jax.errors import SettingError, check_choice, check_range, renamed_in_errors
from mdt_jax.logs import counted, logger
from mdt_jax.paths import output_folder

BATCH_SIZE = 64  # images in memory at once
SAMPLED = 10_000  # records that the logged statistics read, at most
SAMPLED_SHARDS = 3  # shards of a bucket that they read, at most
# Standard deviations of a channel outside of this range get a warning.
USUAL_STD = (0.5, 2.0)
MIN_STD = 1e-6  # a channel with a smaller std counts as constant
MAX_STORED = 1e38  # mean or std of a channel in a card, at most
# Setting in an error of an inner function -> argument of `import_features`.
_ARGUMENTS = {
  "config.data.max_unreadable": "max_unreadable",
  "config.data.path": "features",
  "--dtype": "dtype",
  "--output": "output",
}


@renamed_in_errors(_ARGUMENTS)
def import_features(
  features: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  labels: str | os.PathLike[str] | None = None,
  convention: Convention | None = None,
  standardize: bool = False,
  dtype: str = "float16",
  num_shards: int | None = None,
  num_threads: int = 8,
  max_unreadable: int = 100,
  process_index: int | None = None,
  process_count: int | None = None,
  condition: Conditions | None = None,
  captions: str | os.PathLike[str] | None = None,
  condition_missing: str = "refuse",
) -> bool:
  """Writes a latent set of features that any encoder made.

  If a call is interrupted, the same call resumes at the first unfinished shard.

  Args:
    features, labels: see `features.open_features`.
    output: folder of the latent set; see `data.latents`.
    convention: what the features mean; None for plain, scaled latents.
    standardize: whether to shift and scale each channel to mean 0 and std 1. The card
      holds the numbers as latents_mean and latents_std.
    dtype: dtype of the stored latents, "float16" or "bfloat16".
    num_shards: number of shards; None for one per 10,000 images.
    num_threads: number of threads that read features.
    max_unreadable: largest accepted number of unreadable features.
    process_index, process_count: index of this process, from 0, and number of processes
      that write the set; None for those of JAX.
    condition, captions, condition_missing: arrays and captions by the names of the
      features, as for `encoding.encode_images`; functions are refused.

  Returns:
    Whether the set is finished; False if other processes still write shards.

  Raises:
    SettingError: an argument is out of range, or the features or labels cannot be used.
  """
  convention = convention or Convention()
  output = output_folder("output", output)
  check_choice("dtype", dtype, latent_card.DTYPES)
  check_range("num_threads", num_threads, 1, 1024)
  check_range("max_unreadable", max_unreadable, 0, 10**8)
  if standardize and (convention.scaling_factor, convention.shift_factor) != (1, 0):
    raise SettingError(
      "standardize", True, "replaces scaling_factor and shift_factor: leave these out"
    )
  index, count = this_process(process_index, process_count)
  source = open_features(features, labels, convention, max_unreadable)
  check_range("num_shards", num_shards, 1, len(source))
  names = [source.name(i) for i in range(len(source))] if condition or captions else []
  arrays = open_image_arrays(condition or {}, captions, condition_missing, names, None)
  num_shards = num_shards or -(-len(source) // IMAGES_PER_SHARD)
  card = {
    "format": latent_card.format_name(arrays is not None),
    "source": file_names.from_path(os.fspath(features)),
    "features": convention.kind,
    "labels": None if labels is None else file_names.from_path(os.fspath(labels)),
    "layout": source.layout,
    "scaled": convention.scaled,
    "num_source_images": len(source),
    "classes": list(source.classes),
    "vae": None,
    "scaling_factor": convention.scaling_factor,
    "shift_factor": convention.shift_factor,
    "latents_mean": None,
    "latents_std": None,
    "latent_shape": list(source.image_shape),
    "dtype": dtype,
    "num_shards": num_shards,
    **({} if arrays is None else arrays.card),
  }
  latent_set = LatentSet(output, card, len(source), num_shards)
  mean, std = _standardization(latent_set, source) if standardize else (None, None)
  if mean is not None and std is not None:
    scale = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    latent_set = dataclasses.replace(latent_set, card=card | scale)
  if latent_set.is_finished():
    logger.info("nothing to do: %s is finished", latent_set.folder)
    return True
  latent_set.check_disk()
  logger.info(
    "%s of shape %s to %d shards, %.2f GB",
    counted(len(source), "feature"),
    source.image_shape,
    num_shards,
    latent_set.num_bytes / 1e9,
  )

  def store(views: np.ndarray) -> np.ndarray:
    if mean is not None and std is not None:
      views = np.stack([(views[:, :, 0] - mean) / std, views[:, :, 1] / std], axis=2)
    with np.errstate(over="ignore"):  # the writer refuses what is not finite
      return views.astype(latent_card.DTYPES[dtype])

  shards = range(index, num_shards, count)
  total = sum(len(latent_set.shard_images(shard)) for shard in shards)
  with tqdm.tqdm(total=total, unit="image") as bar:
    finished = write_latents(
      latent_set,
      source,
      store,
      batch_size=BATCH_SIZE,
      num_threads=num_threads,
      process_index=index,
      process_count=count,
      progress=bar.update,
      arrays=arrays,
    )
  if finished:
    _describe(output)
  return finished


def _standardization(
  latent_set: LatentSet, source: FeatureSource
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and std of each channel over all readable features, (C,) float32 each.

  A set that is begun or finished holds these numbers in its card.

  Raises:
    SettingError: too many features are unreadable, a channel is constant, or the folder
      holds a set that is not standardized.
  """
  stored = latent_set.stored_card()
  if stored is not None:
    mean, std = (
      _stored(latent_set, stored, name) for name in ("latents_mean", "latents_std")
    )
    return mean, std
  with tqdm.tqdm(total=len(source), unit="image", desc="statistics") as bar:
    readable = source.readable(bar.update)
    mean, std = channel_statistics(example["image"] for example in readable)
  if not (std > MIN_STD).all():
    constant = int(np.argmin(std))
    raise SettingError("standardize", True, f"channel {constant} is constant")
  return mean.astype(np.float32), std.astype(np.float32)


def _stored(latent_set: LatentSet, card: dict[str, Any], name: str) -> np.ndarray:
  """The numbers of each channel in a card, (C,) float32; raises SettingError."""
  values, channels = card.get(name), latent_set.layout.latent_shape[-1]
  if (
    not isinstance(values, list)
    or len(values) != channels
    or not all(
      type(value) in (int, float) and abs(value) < MAX_STORED for value in values
    )
    or (name == "latents_std" and np.float32(min(values)) <= 0)
  ):
    raise latent_set.error(
      f"holds a latent set with {name} = {latent_card.shorten(values)}, not one number "
      f"for each of {channels} channels; use another folder or the settings of that set"
    )
  return np.asarray(values, np.float32)


def _describe(output: Any) -> None:
  """Logs the size and the statistics of a finished set; warns if its scale is odd."""
  source = open_set(output)
  held = DataLabels.of(source)
  held.warn_of_order()
  logger.info("%s in %s: %s", counted(len(source), "image"), output, held.describe())
  places = (
    np.linspace(0, len(source) - 1, min(len(source), SAMPLED)).round().astype(int)
  )
  if is_bucket(output):  # each shard is downloaded as a whole
    places = _in_few_shards(source, places)
  mean, std = channel_statistics(source[place]["views"] for place in places.tolist())
  for name, numbers in (("mean", mean), ("std", std)):
    logger.info("%s by channel: %s", name, " ".join(f"{v:.4f}" for v in numbers))
  if std.min() < USUAL_STD[0] or std.max() > USUAL_STD[1]:
    logger.warning(
      "the std of a channel should be near 1, and lies in [%.3g, %.3g]: give "
      "--scaling_factor with --noscaled, or --standardize",
      std.min(),
      std.max(),
    )


def _in_few_shards(source: LatentSource, places: np.ndarray) -> np.ndarray:
  """Keeps the places of records that are in `SAMPLED_SHARDS` evenly spaced shards."""
  shards = [source.locate(place)[0] for place in places.tolist()]
  names = [*dict.fromkeys(shards)]
  chosen = np.linspace(0, len(names) - 1, min(len(names), SAMPLED_SHARDS)).round()
  kept = {names[number] for number in chosen.astype(int).tolist()}
  return places[[shard in kept for shard in shards]]
