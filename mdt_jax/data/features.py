"""Reads latents of any encoder that other tools stored, to import them.

Accepted are

- a folder of .npy files, one for each image or for a few images; labels are in a second
  folder of .npy files with the same names (fast-DiT: imagenet256_features and
  imagenet256_labels), in subfolders, or in dataset.json;
- one .npy, .npz or .safetensors file, or a folder of .safetensors files, that hold
  arrays of many images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from mdt_jax.buckets import is_bucket
from mdt_jax.data.examples import Example, TolerantSource
from mdt_jax.data.feature_files import ArrayRows, FolderRows, Rows, refuse
from mdt_jax.errors import SettingError, check_choice

LAYOUTS = ("channels_first", "channels_last")
# What the channels hold: latents, or the mean and then the std or log variance of each.
KINDS = ("samples", "mean_std", "mean_logvar")
# Bounds of log variances, as in diffusers.
_LOG_VARIANCES = (-30.0, 20.0)


class Convention(NamedTuple):
  """What stored features mean.

  Attributes:
    layout: one of LAYOUTS; None infers the layout from the shape of a square feature.
    kind: one of KINDS.
    scaling_factor, shift_factor: latents are (x - shift_factor) * scaling_factor.
    scaled: whether the stored features are these latents already.
  """

  layout: str | None = None
  kind: str = "samples"
  scaling_factor: float = 1.0
  shift_factor: float = 0.0
  scaled: bool = True

  def check(self) -> None:
    """Raises SettingError for a value that cannot be used."""
    if self.layout is not None:
      check_choice("layout", self.layout, LAYOUTS)
    check_choice("kind", self.kind, KINDS)
    if not 0 < self.scaling_factor < 1e6:
      raise SettingError("scaling_factor", self.scaling_factor, "must lie in (0, 1e6)")
    if not -1e6 < self.shift_factor < 1e6:
      raise SettingError("shift_factor", self.shift_factor, "must lie in (-1e6, 1e6)")


class FeatureSource(TolerantSource):
  """A source of moments of latents from stored features.

  The entry "image" of an example is float32 (2, 2, H, W, C), as in a latent set: axis 0
  is the image and its mirror image, axis 1 is mean and std. Features without a mirror
  image hold the image twice. Plain latents have a std of 0.

  Attributes:
    classes: names of the classes.
    layout: one of LAYOUTS.
    files: this object; `name` gives the name of an image for a latent set.

  Args:
    path: path of the features, as the user typed it.
    rows: the stored features.
    convention: what they mean.
    max_unreadable: largest accepted number of unreadable features.

  Raises:
    SettingError: the shape of the first feature cannot be used.
  """

  def __init__(
    self, path: str, rows: Rows, convention: Convention, max_unreadable: int
  ):
    super().__init__(path, max_unreadable)
    convention.check()
    self.files = self
    self.classes = rows.classes
    self.num_classes = len(rows.classes)
    self._rows, self._convention = rows, convention
    shape = self._rows.shape
    if len(shape) != 3 or 0 in shape:
      raise refuse(path, f"must hold features of 3 axes, holds shape {shape}")
    self.layout = convention.layout or _layout_of(path, shape)
    self._first = self.layout == "channels_first"
    channels, height, width = shape if self._first else (shape[2], *shape[:2])
    if convention.kind != "samples" and channels % 2:
      raise refuse(
        path,
        f"has {channels} channels; {convention.kind} needs twice as many"
        " as latents have",
      )
    channels //= 1 if convention.kind == "samples" else 2
    self.image_shape: tuple[int, int, int] = (height, width, channels)

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, index: int) -> str:
    return self._rows.name(index)

  def load(self, index: int) -> Example:
    """Reads the moments of image `index`; raises if the feature is unreadable."""
    image, mirror, label = self._rows.read(index)
    views = [self._moments(image)]
    views.append(views[0] if mirror is None else self._moments(mirror))
    if not 0 <= label < self.num_classes:
      raise ValueError(f"label {label} must lie in [0, {self.num_classes})")
    return {"image": np.stack(views), "label": np.int32(label)}

  def _moments(self, feature: np.ndarray) -> Float32[np.ndarray, "2 H W C"]:
    """Mean and std of latents, channels last; raises ValueError if not finite."""
    # The kind of bfloat16 and of 8-bit floats is "V", as of types without numbers.
    is_float = feature.dtype.kind in "fV" and feature.dtype.type is not np.void
    if feature.shape != self._rows.shape or not is_float:
      raise ValueError(
        f"must be floats of shape {self._rows.shape}, found {feature.dtype} of shape "
        f"{feature.shape}"
      )
    with np.errstate(over="ignore"):
      array = feature.astype(np.float32)
    if self._first:
      array = np.moveaxis(array, 0, -1)
    if self._convention.kind == "samples":
      mean, std = array, np.zeros_like(array)
    else:
      mean, std = np.split(array, 2, axis=-1)
      if self._convention.kind == "mean_logvar":
        std = np.exp(np.clip(std, *_LOG_VARIANCES) / 2)
    if not self._convention.scaled:
      mean = (mean - self._convention.shift_factor) * self._convention.scaling_factor
      std = std * self._convention.scaling_factor
    found = np.stack([mean, std]).astype(np.float32)
    if not np.isfinite(found).all():
      raise ValueError("must be finite")
    return found


def open_features(
  path: str | os.PathLike[str],
  labels: str | os.PathLike[str] | None,
  convention: Convention,
  max_unreadable: int,
) -> FeatureSource:
  """Opens stored features.

  Args:
    path: the features; see the docstring of this module.
    labels: folder or .npy file of labels; None: the folder NAME_labels beside a folder
      NAME_features, or the labels in the files of the features.
    convention: what the features mean.
    max_unreadable: largest accepted number of unreadable features.

  Raises:
    SettingError: setting "features" or "labels": a file cannot be read, or has a shape
      that cannot be used.
  """
  for setting, value in (("features", path), ("labels", labels)):
    if value is not None and is_bucket(value):
      raise SettingError(
        setting,
        os.fspath(value),
        "must be a local path: copy it to a local disk (gcloud storage cp -r), or "
        "mount the bucket",
      )
  text = os.path.expanduser(os.fspath(path))
  if labels is None and text.rstrip("/").endswith("_features"):
    beside = text.rstrip("/").removesuffix("features") + "labels"
    labels = beside if os.path.isdir(beside) else None
  if not os.path.exists(text):
    raise refuse(str(path), "does not exist")
  if os.path.isdir(text) and not any(Path(text).glob("*.safetensors")):
    rows: Rows = FolderRows(text, labels)
  else:
    rows = ArrayRows(text, labels)
  return FeatureSource(text, rows, convention, max_unreadable)


def _layout_of(path: str, shape: tuple[int, ...]) -> str:
  """The layout of square features; raises SettingError if both fit, or neither."""
  first, last = shape[1] == shape[2], shape[0] == shape[1]
  if first == last:
    raise SettingError(
      "layout",
      None,
      f"must be given, {' or '.join(LAYOUTS)}: features of {path} have shape {shape}",
    )
  return LAYOUTS[0] if first else LAYOUTS[1]
