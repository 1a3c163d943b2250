"""Files of real images or of their statistics, which scores compare with."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import scores
from mdt_jax.evaluation.features import FeatureExtractor
from mdt_jax.evaluation.image_streams import IMAGES, NpzImages
from mdt_jax.evaluation.metrics import Statistics
from mdt_jax.evaluation.registry import METRICS
from mdt_jax.evaluation.summary import Summary

# Ends of the names of mean and covariance in ADM's files, by features: mu_s, sigma_s.
_ADM_SUFFIXES = {"pool3": "", "spatial": "_s"}
_FEATURES = "features_"  # prefix of arrays of features


def read_reference(
  path: str | Path,
  names: Sequence[str],
  extract: FeatureExtractor,
  *,
  setting: str = "path",
  progress: str | None = None,
) -> Summary:
  """Reads from a file what the scores need of the real images.

  Args:
    path: an .npz file with images (arr_0, and labels arr_1), with statistics (mu,
      sigma, mu_s, sigma_s), or with both, as ADM's reference batches have; or a file
      that `save_statistics` wrote. Statistics in the file are used as they are; images
      pass through `extract` only for what the file lacks.
    names: keys of `METRICS`.
    extract: computes the features.
    setting: name of the file's setting, for errors.
    progress: see `scores.summarize`.

  Raises:
    SettingError: the file cannot be read (see also `NpzImages`), or lacks what a score
      needs.
  """
  stored, has_images = _read_summary(Path(path), setting)
  lacking = _lacking(stored, names)
  if not lacking:
    return stored
  if not has_images:
    raise SettingError(
      setting,
      str(path),
      f"holds neither images (arr_0) nor what {', '.join(lacking)} must know of them",
    )
  images = NpzImages(path, setting)
  computed = scores.summarize(images, extract, lacking, progress=progress)
  return Summary(
    computed.statistics | stored.statistics,
    stored.features | computed.features,
    computed.labels if stored.labels is None else stored.labels,
  )


def save_statistics(path: str | Path, summary: Summary) -> None:
  """Writes a summary to an .npz file, for `read_reference`; the write is atomic.

  Means and covariances have the names of ADM's reference batches.
  """
  path = Path(path)
  arrays = {f"{_FEATURES}{name}": rows for name, rows in summary.features.items()}
  for name, statistics in summary.statistics.items():
    mean, covariance = _keys(name)
    arrays |= {mean: statistics.mean, covariance: statistics.covariance}
  if summary.labels is not None:
    arrays["labels"] = summary.labels
  with atomic_write(path) as partial, partial.open("wb") as file:
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _keys(features: str) -> tuple[str, str]:
  """Names of the arrays that hold the mean and the covariance of features."""
  suffix = _ADM_SUFFIXES.get(features, f"_{features}")
  return f"mu{suffix}", f"sigma{suffix}"


def _lacking(summary: Summary, names: Sequence[str]) -> list[str]:
  """The scores that need more of the real images than the summary holds."""

  def suffices(name: str) -> bool:
    metric = METRICS[name]
    return (
      (metric.gaussian is None or metric.gaussian in summary.statistics)
      and (metric.kept is None or metric.kept in summary.features)
      and (not metric.needs_labels or summary.labels is not None)
    )

  return [name for name in scores.of_real_images(names) if not suffices(name)]


def _read_summary(path: Path, setting: str) -> tuple[Summary, bool]:
  """The part of a summary that a file holds, and whether the file holds images."""
  known = dict.fromkeys(m.gaussian for m in METRICS.values() if m.gaussian is not None)
  try:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
      raise SettingError(setting, str(path), "must be an .npz file")
    with loaded as file:
      statistics = {
        name: Statistics(*(file[key].astype(np.float64) for key in _keys(name)))
        for name in known
        if all(key in file.files for key in _keys(name))
      }
      features = {
        key.removeprefix(_FEATURES): file[key]
        for key in file.files
        if key.startswith(_FEATURES)
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
    keys = " and ".join(_keys(name))
    size = found.mean.size
    if found.mean.shape != (size,) or found.covariance.shape != (size, size):
      raise SettingError(
        setting,
        str(path),
        f"{keys} have shapes {found.mean.shape} and {found.covariance.shape}; "
        "accepted are (D,) and (D, D)",
      )
    if not (np.isfinite(found.mean).all() and np.isfinite(found.covariance).all()):
      raise SettingError(setting, str(path), f"{keys} must be finite")
  return Summary(statistics, features, labels), has_images
