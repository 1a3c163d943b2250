"""Computes scores of generated images against real images, by name of the score.

`summarize` computes features of images and keeps a `Summary` of the features. `score`
computes scores from two summaries. `registry.METRICS` lists the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Int

from mdt_jax.data.sources import Source
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.condition_scores import condition_vectors
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_streams import ImageStream
from mdt_jax.evaluation.metrics import RunningStatistics
from mdt_jax.evaluation.registry import METRICS
from mdt_jax.evaluation.summary import Summary
from mdt_jax.sharding import fetch
from mdt_jax.types import Array, Params


def make_extractor(
  names: Sequence[str],
  inception: Params = None,
  batch_size: int = 64,
  mesh: Mesh | None = None,
) -> FeatureExtractor:
  """Builds the extractor of all features that the scores use.

  Args:
    names: keys of `METRICS`.
    inception: parameters from `pretrained.torch_inception.load_inception`; None if no
      score needs Inception.
    batch_size: see `FeatureExtractor`.
    mesh: see `FeatureExtractor`.
  """
  functions = list(dict.fromkeys(METRICS[name].extract for name in names))

  def features(params: Params, images: Array) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for function in functions:
      found |= function(params, images)
    return found

  return FeatureExtractor(features, inception, batch_size, mesh)


def summarize(
  images: ImageStream,
  extract: FeatureExtractor,
  names: Sequence[str],
  *,
  progress: str | None = None,
) -> Summary:
  """Reads images once and computes the summary that the scores need.

  Args:
    images: any number of images. Each image takes 8 kB of memory for precision and
      recall, 4 kB for the Inception score, and nothing for FID and sFID.
    extract: computes the features.
    names: keys of `METRICS`.
    progress: title of a progress bar; None for no bar.

  Returns:
    The statistics, features and labels that the scores use.

  Raises:
    SettingError: the images cannot be read, or are too few for a score.
  """
  check_number(len(images), names, "images")
  metrics = [METRICS[name] for name in names]
  statistics = {m.gaussian: RunningStatistics() for m in metrics if m.gaussian}
  kept = {m.kept: np.empty((0, 0), np.float32) for m in metrics if m.kept}
  needs_labels = any(m.needs_labels for m in metrics)
  all_labels: list[np.ndarray] = []
  done = 0
  with tqdm.tqdm(
    total=len(images), unit="image", desc=progress, disable=progress is None
  ) as bar:
    for found, labels, count in _features(images, extract):
      for name in sorted({*statistics, *kept}):  # the same order in all processes
        features = fetch(found[name])
        if name in statistics:
          statistics[name].add(features)
        if name in kept:
          if not done:
            kept[name] = np.empty((len(images), features.shape[1]), np.float32)
          kept[name][done : done + count] = features
      if labels is not None and needs_labels:
        all_labels.append(labels)
      done += count
      bar.update(count)
  conditions = None
  if any(metric.needs_conditions for metric in metrics):
    conditions = condition_vectors(getattr(images, "arrays", {}))
  return Summary(
    {name: running.result() for name, running in statistics.items()},
    kept,
    np.concatenate(all_labels) if all_labels else None,
    conditions,
  )


def score(names: Sequence[str], real: Summary, generated: Summary) -> dict[str, float]:
  """Computes scores from two summaries.

  Args:
    names: keys of `METRICS`.
    real: summary of the real images, computed for all of these scores.
    generated: summary of the generated images, computed for all of these scores.

  Returns:
    Score by name, in the order of `names`.

  Raises:
    SettingError: labels are missing, or the features have different dimensions.
  """
  found: dict[str, float] = {}
  for name in names:
    if name in found:
      continue
    _check_sizes(name, real, generated)
    value = METRICS[name].compute(real, generated)
    found |= value if isinstance(value, dict) else {name: value}
  return {name: found[name] for name in names}


def _check_sizes(name: str, real: Summary, generated: Summary) -> None:
  """Raises SettingError if a score compares images of different sizes."""
  kept = METRICS[name].kept
  if kept is None or not METRICS[name].needs_real:
    return
  expected, found = (
    summary.features[kept].shape[1] if kept in summary.features else None
    for summary in (real, generated)
  )
  if expected != found and None not in (expected, found):
    raise SettingError(
      "metrics",
      name,
      f"needs images of equal size and channels: a real one has {expected} features, "
      f"another one {found}",
    )


def of_real_images(names: Sequence[str]) -> list[str]:
  """The scores that use real images."""
  return [name for name in names if METRICS[name].needs_real]


def check_data(
  names: Sequence[str], source: Source, labels: Int[np.ndarray, " N"] | None = None
) -> None:
  """Raises SettingError if a score does not exist for the run's data.

  Args:
    names: keys of `METRICS`.
    source: the data of the run.
    labels: labels of images to be drawn, if they are known.
  """
  for name in names:
    check = METRICS[name].check_data
    if check is not None:
      check(source, labels)


def check_number(count: int, names: Sequence[str], setting: str) -> None:
  """Raises SettingError for `setting` if `count` images are too few for a score.

  Args:
    count: number of images, real or to be drawn.
    names: keys of `METRICS`.
    setting: name of the setting in the error, such as "config.eval.num_images".
  """
  for name in names:
    fewest = METRICS[name].fewest
    if count < fewest:
      raise SettingError(setting, count, f"{name} needs at least {fewest}")


def check_comparable(
  names: Sequence[str],
  real: Summary,
  count: int,
  labels: Int[np.ndarray, " N"] | None,
  sizes: Mapping[str, int],
  *,
  path: str | None = None,
  prefix: str = "",
) -> None:
  """Checks before images are drawn that the scores will exist.

  Args:
    names: keys of `METRICS`.
    real: summary of the real images.
    count: number of images to be drawn.
    labels: their labels; None if their condition has no labels.
    sizes: number of features of an image to be drawn, by name of the features; see
      `FeatureExtractor.sizes`.
    path: value of the setting "reference", for errors.
    prefix: prefix of the names of settings in errors, such as "config.eval.".

  Raises:
    SettingError: the images to be drawn are too few, or have other sizes, channels or
      classes than a score needs.
  """
  check_number(count, names, f"{prefix}num_images")
  for name in of_real_images(names):
    metric = METRICS[name]
    if metric.gaussian is not None:
      features, found = metric.gaussian, real.statistics[metric.gaussian].mean.size
    else:
      assert metric.kept is not None
      features, found = metric.kept, real.features[metric.kept].shape[1]
    if found != sizes[features]:
      raise SettingError(
        f"{prefix}reference",
        path,
        f"has {found} features ({features}) for each image, and the images to be drawn "
        f"have {sizes[features]}: the images have other sizes or channels",
      )
    if not metric.needs_labels:
      continue
    if real.labels is None:
      raise SettingError(
        f"{prefix}reference", path, f"{name} needs labels of the images (arr_1)"
      )
    if labels is None:
      accepted = f"{name} needs class labels, which the condition of the network lacks"
      raise SettingError(f"{prefix}metrics", name, accepted)
    if metric.check_labels is not None:
      try:
        metric.check_labels(real.labels, labels)
      except SettingError as error:
        value = path if error.setting == "reference" else error.value
        setting = f"{prefix}{error.setting}"
        raise SettingError(setting, value, error.accepted) from None


def _features(
  images: ImageStream, extract: FeatureExtractor
) -> Iterator[tuple[dict[str, Array], np.ndarray | None, int]]:
  """Yields (features, labels, number of images) of each batch.

  The next batch is read while the devices compute the current batch.
  """
  pending = None
  for batch, labels in images.batches(extract.batch_size):
    following = extract(batch), labels, len(batch)
    if pending is not None:
      yield pending
    pending = following
  if pending is not None:
    yield pending
