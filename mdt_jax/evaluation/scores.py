"""Scores of generated images against real ones, by name.

What a set of images leaves behind is a `Summary`: statistics of some features and, for
the scores that need them, features of each image. Two of them make the scores.
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from mdt_jax.atomic import atomic_write
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import classifier, metrics
from mdt_jax.evaluation.features import (
  FeatureExtractor,
  FeatureFn,
  inception_features,
  pixel_features,
)
from mdt_jax.evaluation.image_streams import IMAGES, ImageStream, NpzImages
from mdt_jax.evaluation.metrics import (
  INCEPTION_METRICS,
  NUM_NEIGHBOURS,
  PIXEL_METRICS,
  RunningStatistics,
  Statistics,
)
from mdt_jax.sharding import fetch

# Score -> the features that a Gaussian is fitted to.
_STATISTICS = {"fid": "pool3", "sfid": "spatial", "frechet": "pixels"}
# Score -> the features of each image that are kept.
_KEPT = {
  "is": "logits",
  "precision": "pool3",
  "recall": "pool3",
  "accuracy": "pixels",
  "diversity": "pixels",
}
_ONE_SIDED = ("is",)  # no real images
_LABELLED = ("accuracy", "diversity")
# Images without which a score cannot be; 2 for the others.
_FEWEST = {"is": 1, "precision": NUM_NEIGHBOURS + 1, "recall": NUM_NEIGHBOURS + 1}

# Features -> their mean and covariance in a file of statistics, as ADM names them.
_FILE_NAMES = {
  "pool3": ("mu", "sigma"),
  "spatial": ("mu_s", "sigma_s"),
  "pixels": ("mu_pixels", "sigma_pixels"),
}
Params = Any


def of_real_images(names: Sequence[str]) -> list[str]:
  """Those of the scores that compare with real images."""
  return [name for name in names if name not in _ONE_SIDED]


@dataclasses.dataclass(frozen=True)
class Summary:
  """What is kept of a set of images.

  Attributes:
    statistics: name of features -> their mean and covariance.
    features: name of features -> (N, D) float32.
    labels: (N,), if there are any and a score needs them.
  """

  statistics: dict[str, Statistics]
  features: dict[str, np.ndarray]
  labels: np.ndarray | None = None

  def lacks(self, names: Sequence[str]) -> list[str]:
    """The scores that it is not enough for, as one of real images."""
    return [
      name
      for name in of_real_images(names)
      if (name in _STATISTICS and _STATISTICS[name] not in self.statistics)
      or (name in _KEPT and _KEPT[name] not in self.features)
      or (name in _LABELLED and self.labels is None)
    ]


def make_extractor(
  names: Sequence[str],
  inception: Params = None,
  batch_size: int = 64,
  mesh: Mesh | None = None,
) -> FeatureExtractor:
  """The features that these scores are of.

  Args:
    names: of `metrics.METRICS`.
    inception: parameters, of `pretrained.torch_inception.load_inception`.
    batch_size, mesh: see `FeatureExtractor`.
  """
  functions: list[FeatureFn] = []
  if set(names) & set(INCEPTION_METRICS):
    functions.append(inception_features)
  if set(names) & set(PIXEL_METRICS):
    functions.append(pixel_features)

  def features(params: Params, images: jax.Array) -> dict[str, jax.Array]:
    found: dict[str, jax.Array] = {}
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
  """Passes images through a feature function once, for all the scores named.

  Args:
    images: any number. The memory needed grows with them by what is kept of each: 8 kB
      for precision and recall, 4 kB for the Inception score, nothing for the others.
    extract: gives the features.
    names: of `metrics.METRICS`.
    progress: what a progress bar is called; None for no bar.

  Raises:
    SettingError: of `images`, or there are too few of them for a score.
  """
  _check_number(len(images), names, "images")
  statistics = {
    _STATISTICS[name]: RunningStatistics() for name in names if name in _STATISTICS
  }
  kept = {_KEPT[name]: np.empty(0) for name in names if name in _KEPT}
  all_labels: list[np.ndarray] = []
  done = 0
  with tqdm.tqdm(
    total=len(images), unit="image", desc=progress, disable=progress is None
  ) as bar:
    for found, labels in _found(images, extract):
      for name in sorted({*statistics, *kept}):  # alike in all processes
        features = fetch(found[name])
        if name in statistics:
          statistics[name].add(features)
        if name in kept:
          if not done:
            kept[name] = np.empty((len(images), features.shape[1]), np.float32)
          kept[name][done : done + len(features)] = features
      if labels is not None and set(names) & set(_LABELLED):
        all_labels.append(labels)
      done += len(features)
      bar.update(len(features))
  return Summary(
    {name: running.result() for name, running in statistics.items()},
    kept,
    np.concatenate(all_labels) if all_labels else None,
  )


def read_reference(
  path: str | Path,
  names: Sequence[str],
  extract: FeatureExtractor,
  *,
  setting: str = "--reference",
  progress: str | None = None,
) -> Summary:
  """What the scores need of real images, in any of the forms that there are.

  Args:
    path: an .npz with images (arr_0, and labels arr_1), with statistics (mu, sigma,
      mu_s, sigma_s), or with both, as ADM's reference batches: then statistics are
      taken as they are, and images pass through the network where precision or recall
      need their features. Or a file of `save_statistics`.
    names: of `metrics.METRICS`.
    extract: gives the features.
    setting: that names the file, for errors.
    progress: see `summarize`.

  Raises:
    SettingError: no such file, of `NpzImages`, or it holds nothing for a score.
  """
  stored, has_images = _read_statistics(Path(path), setting)
  lacking = stored.lacks(names)
  if not lacking:
    return stored
  if not has_images:
    raise SettingError(
      setting,
      str(path),
      f"holds neither images (arr_0) nor what {', '.join(lacking)} must know of them",
    )
  images = NpzImages(path, setting)
  computed = summarize(images, extract, lacking, progress=progress)
  return Summary(
    computed.statistics | stored.statistics,
    stored.features | computed.features,
    computed.labels if stored.labels is None else stored.labels,
  )


def save_statistics(path: str | Path, summary: Summary) -> None:
  """Writes a summary to an .npz file, for `read_reference`; whole or not at all.

  Means and covariances carry the names of ADM's reference batches.
  """
  path = Path(path)
  arrays = {f"features_{name}": rows for name, rows in summary.features.items()}
  for name, statistics in summary.statistics.items():
    mean, covariance = _FILE_NAMES[name]
    arrays |= {mean: statistics.mean, covariance: statistics.covariance}
  if summary.labels is not None:
    arrays["labels"] = summary.labels
  with atomic_write(path) as partial, partial.open("wb") as file:
    np.savez(file, **arrays)


def check_comparable(
  names: Sequence[str],
  real: Summary,
  labels: np.ndarray,
  sizes: Mapping[str, int],
  *,
  number: str = "--num_images",
  reference: str = "--reference",
  path: str | None = None,
) -> None:
  """Raises SettingError for a score that images which are yet to be drawn cannot have.

  Args:
    names: of `metrics.METRICS`.
    real: what they will be compared with.
    labels: (N,) of the images.
    sizes: of their features; see `FeatureExtractor.sizes`.
    number, reference: the settings of their number and of the real images.
    path: value of the latter.
  """
  _check_number(len(labels), names, number)
  for name in of_real_images(names):
    if name in _STATISTICS:
      features = _STATISTICS[name]
      found = real.statistics[features].mean.size
    else:
      features = _KEPT[name]
      found = real.features[features].shape[1]
    if found != sizes[features]:
      raise SettingError(
        reference,
        path,
        f"has {found} {features} of an image, where those drawn have "
        f"{sizes[features]}: their channels or sizes differ",
      )
    if name in _LABELLED and real.labels is None:
      raise SettingError(reference, path, f"{name} needs labels of its images (arr_1)")
  if "accuracy" in names and len(np.unique(real.labels)) < 2:
    raise SettingError(reference, path, "accuracy needs images of at least 2 classes")
  if "diversity" in names:
    repeated = []
    for labels_of_a_set in (labels, real.labels):
      classes, counts = np.unique(labels_of_a_set, return_counts=True)
      repeated.append(classes[counts > 1])
    if not np.intersect1d(*repeated).size:
      raise SettingError(
        number,
        len(labels),
        "diversity needs two images of a class, real ones and drawn ones; the "
        "classes are drawn in turn",
      )


def score(names: Sequence[str], real: Summary, generated: Summary) -> dict[str, float]:
  """The scores named, in their order.

  Raises:
    SettingError: labels are missing, or features have other dimensions.
  """
  found: dict[str, float] = {}
  for name in names:
    if name in found:
      continue
    if name in _STATISTICS:
      features = _STATISTICS[name]
      found[name] = metrics.frechet_distance(
        real.statistics[features], generated.statistics[features]
      )
    elif name == "is":
      found[name] = metrics.inception_score(generated.features["logits"])
    elif name in ("precision", "recall"):
      both = metrics.precision_recall(
        real.features["pool3"], generated.features["pool3"]
      )
      found |= dict(zip(("precision", "recall"), both, strict=True))
    else:
      found[name] = _labelled_score(name, real, generated)
  return {name: found[name] for name in names}


def _labelled_score(name: str, real: Summary, generated: Summary) -> float:
  for what, summary in (("real", real), ("generated", generated)):
    if summary.labels is None:
      raise SettingError(f"{what} images", None, f"{name} needs their labels (arr_1)")
  function = classifier.SCORES[name]
  return function(
    real.features["pixels"],
    real.labels,
    generated.features["pixels"],
    generated.labels,
  )


def _found(
  images: ImageStream, extract: FeatureExtractor
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray | None]]:
  """Features and labels, batch by batch; the next one is read while they compute."""
  pending = None
  for batch, labels in images.batches(extract.batch_size):
    following = extract(batch), labels
    if pending is not None:
      yield pending
    pending = following
  if pending is not None:
    yield pending


def _check_number(count: int, names: Sequence[str], setting: str) -> None:
  for name in names:
    fewest = _FEWEST.get(name, 2)
    if count < fewest:
      raise SettingError(setting, count, f"{name} needs at least {fewest}")


def _read_statistics(path: Path, setting: str) -> tuple[Summary, bool]:
  """What a file holds of a summary, and whether it holds images."""
  try:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
      raise SettingError(setting, str(path), "must be an .npz file")
    with loaded as file:
      statistics = {
        name: Statistics(*(file[key].astype(np.float64) for key in keys))
        for name, keys in _FILE_NAMES.items()
        if all(key in file.files for key in keys)
      }
      prefix = "features_"
      features = {
        key.removeprefix(prefix): file[key]
        for key in file.files
        if key.startswith(prefix)
      }
      labels = file["labels"] if "labels" in file.files else None
      has_images = IMAGES in file.files
  except SettingError:
    raise
  except FileNotFoundError:
    raise SettingError(setting, str(path), "must be a file") from None
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
    raise SettingError(
      setting, str(path), f"no .npz file that can be read: {error}"
    ) from None
  for name, found in statistics.items():
    size = found.mean.size
    if found.mean.shape != (size,) or found.covariance.shape != (size, size):
      raise SettingError(
        setting,
        str(path),
        f"{' and '.join(_FILE_NAMES[name])} have shapes {found.mean.shape} and "
        f"{found.covariance.shape}; accepted are (D,) and (D, D)",
      )
    if not (np.isfinite(found.mean).all() and np.isfinite(found.covariance).all()):
      raise SettingError(
        setting, str(path), f"{' and '.join(_FILE_NAMES[name])} must be finite"
      )
  return Summary(statistics, features, labels), has_images
