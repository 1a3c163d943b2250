"""Reads and writes reference files: real images, or their statistics."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath
from mdt_jax.data import npy_format
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import scores
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_files import FileImages, has_image_files
from mdt_jax.evaluation.image_streams import IMAGES, NpzImages, open_npz
from mdt_jax.evaluation.metrics import Statistics, is_covariance
from mdt_jax.evaluation.registry import METRICS
from mdt_jax.evaluation.summary import Summary
from mdt_jax.paths import input_file, output_file

# Features -> suffix of the names of mean and covariance in ADM's files, as in mu_s.
_ADM_SUFFIXES = {"pool3": "", "spatial": "_s"}
_FEATURES = "features_"  # prefix of the names of arrays of features


def read_reference(
  path: str | os.PathLike[str],
  names: Sequence[str],
  extract: FeatureExtractor,
  *,
  setting: str = "path",
  progress: str | None = None,
  held: DataLabels | None = None,
) -> Summary:
  """Reads the summary of the real images, as far as the scores need it.

  The function uses the statistics in the file, and computes features of the images only
  for scores whose statistics the file lacks.

  Args:
    path: folder or .tar file of images, see `FileImages`; or .npz file with images
      (arr_0, and labels arr_1), with statistics (mu, sigma,
      mu_s, sigma_s), or with both, like ADM's reference batches; or a file of
      `save_statistics`.
    names: keys of `METRICS`.
    extract: computes the features.
    setting: name of the setting that holds `path`, for errors.
    progress: title of a progress bar; None for no bar.
    held: labels of the data of the run that is scored, so that classes of image files
      have the labels of the run's classes of the same names; None without a run.

  Returns:
    The summary of the real images.

  Raises:
    SettingError: the file cannot be read (see also `NpzImages`), or holds neither
      images nor the statistics that a score needs.
  """
  if has_image_files(path, setting):
    images = FileImages(path, setting, {} if held is None else held.label_of)
    return scores.summarize(images, extract, names, progress=progress)
  stored, has_images = _read_summary(input_file(setting, path), setting)
  lacking = _lacking(stored, names)
  if not lacking:
    return stored
  if not has_images:
    raise SettingError(
      setting,
      str(path),
      f"holds neither images (arr_0) nor the statistics for {', '.join(lacking)}",
    )
  images = NpzImages(path, setting)
  computed = scores.summarize(images, extract, lacking, progress=progress)
  return Summary(
    computed.statistics | stored.statistics,
    stored.features | computed.features,
    computed.labels if stored.labels is None else stored.labels,
  )


def save_statistics(path: str | os.PathLike[str], summary: Summary) -> None:
  """Writes a summary to an .npz file that `read_reference` reads; the write is atomic.

  Means and covariances have the same names as in ADM's reference batches.
  """
  file = output_file("path", path)
  arrays = {f"{_FEATURES}{name}": rows for name, rows in summary.features.items()}
  for name, statistics in summary.statistics.items():
    mean, covariance = _keys(name)
    arrays |= {mean: statistics.mean, covariance: statistics.covariance}
  if summary.labels is not None:
    arrays["labels"] = summary.labels
  with atomic_write(file) as partial, partial.open("wb") as opened:
    np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]


def _keys(features: str) -> tuple[str, str]:
  """Names of the arrays in a file that hold mean and covariance of some features."""
  suffix = _ADM_SUFFIXES.get(features, f"_{features}")
  return f"mu{suffix}", f"sigma{suffix}"


def _lacking(summary: Summary, names: Sequence[str]) -> list[str]:
  """The scores that need statistics or labels that the summary lacks."""

  def suffices(name: str) -> bool:
    metric = METRICS[name]
    return (
      (metric.gaussian is None or metric.gaussian in summary.statistics)
      and (metric.kept is None or metric.kept in summary.features)
      and (not metric.needs_labels or summary.labels is not None)
    )

  return [name for name in scores.of_real_images(names) if not suffices(name)]


def _read_summary(path: AnyPath, setting: str) -> tuple[Summary, bool]:
  """Reads the statistics of a file, and whether the file holds images."""
  known = dict.fromkeys(m.gaussian for m in METRICS.values() if m.gaussian is not None)
  try:
    with open_npz(path) as file:
      held = npy_format.member_names(file)
      statistics = {
        name: Statistics(*(_read_real(file, key) for key in _keys(name)))
        for name in known
        if all(key in held for key in _keys(name))
      }
      features = {
        key.removeprefix(_FEATURES): _read_real(file, key)
        for key in held
        if key.startswith(_FEATURES)
      }
      labels = npy_format.read_member(file, "labels") if "labels" in held else None
      has_images = IMAGES in held
  except SettingError:
    raise
  except FileNotFoundError:
    raise SettingError(setting, str(path), "must be a file") from None
  except npy_format.ERRORS as error:
    raise SettingError(
      setting, str(path), f"is not a readable .npz file: {error}"
    ) from None
  for name, found in statistics.items():
    keys = " and ".join(_keys(name))
    size = found.mean.size
    if found.mean.shape != (size,) or found.covariance.shape != (size, size):
      raise SettingError(
        setting,
        str(path),
        f"{keys} have shapes {found.mean.shape} and {found.covariance.shape}; "
        "accepted are (D,) and (D, D)",
      )
    # Also refuses NaN and infinity. The distance squares the numbers.
    largest = max(np.abs(x).max(initial=0) for x in (found.mean, found.covariance))
    if not largest < 1e100:
      raise SettingError(setting, str(path), f"{keys} must be finite")
    if not is_covariance(found.covariance):
      raise SettingError(
        setting,
        str(path),
        f"{_keys(name)[1]} must be symmetric with eigenvalues of at least 0",
      )
  for name, rows in features.items():
    if rows.ndim != 2 or not np.isfinite(rows).all():
      raise SettingError(
        setting, str(path), f"{_FEATURES}{name} must have shape (N, D) and be finite"
      )
  if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
    raise SettingError(setting, str(path), "labels must be integers of shape (N,)")
  return Summary(statistics, features, labels), has_images


def _read_real(file: zipfile.ZipFile, key: str) -> np.ndarray:
  """Reads an array of real numbers; statistics become float64, features stay.

  Raises:
    ValueError: the array holds anything else.
  """
  array = npy_format.read_member(file, key)
  if array.dtype.kind not in "biuf":
    raise ValueError(f"{key} must hold real numbers, holds {array.dtype}")
  return array if key.startswith(_FEATURES) else array.astype(np.float64)
