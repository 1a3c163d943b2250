"""The registry of data sources, the values of `config.data.source`.

To add a source, write a class that implements `examples.Source` and a function that
opens it from `SourceArguments`, and add an entry to SOURCES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mdt_jax.buckets import is_bucket
from mdt_jax.data.arrays import open_arrays
from mdt_jax.data.digits import DigitsSource, open_digits
from mdt_jax.data.examples import Source, SourceArguments, Subset, split_indices
from mdt_jax.data.files import TFDS_PREFIX
from mdt_jax.data.images import open_images
from mdt_jax.data.latents import open_latents
from mdt_jax.data.memory import MemorySource
from mdt_jax.data.npz import open_npz
from mdt_jax.data.relations import RelationsSource, open_relations
from mdt_jax.errors import SettingError, check_choice
from mdt_jax.paths import local_path
from mdt_jax.sizes import Size, to_size

__all__ = [
  "SOURCES",
  "DigitsSource",
  "MemorySource",
  "RelationsSource",
  "Source",
  "SourceEntry",
  "Subset",
  "create_source",
  "split_indices",
]


class SourceEntry(NamedTuple):
  """An entry of SOURCES.

  Attributes:
    open: function that opens the source; raises SettingError if that fails.
    pixels: whether the examples are pixels; False for latents.
    path: description of the required `config.data.path`, for messages; None for a
      source without a path.
    takes_arguments: whether the source has settings of its own,
      `config.data.arguments`.
  """

  open: Callable[[SourceArguments], Source]
  pixels: bool
  path: str | None
  takes_arguments: bool = False


SOURCES: dict[str, SourceEntry] = {
  "digits": SourceEntry(open_digits, True, None),
  "relations": SourceEntry(open_relations, True, None, takes_arguments=True),
  "images": SourceEntry(
    open_images, True, "a folder of images, .tar files or tfds:NAME"
  ),
  "latents": SourceEntry(open_latents, False, "an output of python -m mdt_jax.encode"),
  # "npz" (pixels) and "arrays" (floats) have separate names, because sampling must know
  # whether a run used pixels even if the data file is not available.
  "npz": SourceEntry(open_npz, True, "an .npz or .npy file of uint8 images"),
  "arrays": SourceEntry(
    open_arrays, False, "a folder of .npy files, or an .npz or .npy file of floats"
  ),
}


def create_source(
  name: str,
  *,
  path: str | os.PathLike[str] | None,
  split: str = "train",
  image_size: Size,
  channels: int,
  max_unreadable: int,
  image_bits: int = 16,
  cache: str | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> Source:
  """Opens a source by name.

  Args:
    name: a key of SOURCES, as in `config.data.source`.
    path: path of the data; see the entry in SOURCES. None for "digits", "relations".
    split: split of a TFDS data set; other sources ignore it.
    image_size: height and width of the examples, see `mdt_jax.sizes`; 8 for "digits".
    channels: number of channels of the examples; 1 for "digits".
    max_unreadable: largest accepted number of unreadable examples.
    image_bits: bits of the values in image files of more than 8 bits.
    cache: local folder that receives a copy of a latent set in a bucket; ignored if
      the set is in a local folder.
    arguments: more settings of the source, by name; see `SourceEntry`.

  Raises:
    SettingError: the name is unknown, a required path is missing, arguments are given
      to a source without any, a path is given to a
      source without one, a path of a bucket to a source that reads none, the source
      does not have this size or number of channels, or the source cannot be opened.
    DataUnavailable: a bucket does not answer.
  """
  check_choice("config.data.source", name, SOURCES)
  entry = SOURCES[name]
  if entry.path is not None and not path:
    raise SettingError("config.data.path", path, f"must be given: {entry.path}")
  if entry.path is None and path:
    others = ", ".join(other for other in SOURCES if SOURCES[other].path is not None)
    raise SettingError(
      "config.data.path",
      os.fspath(path),
      f"must be left out: config.data.source = {name!r} reads no path; "
      f"the sources of a path are {others}",
    )
  if arguments and not entry.takes_arguments:
    accepted = f"must be empty for config.data.source = {name!r}"
    raise SettingError("config.data.arguments", dict(arguments), accepted)
  path = os.fspath(path) if path else ""
  if is_bucket(path):
    _check_reads_buckets(name, path)
  elif entry.path is not None and not path.startswith(TFDS_PREFIX):
    local_path("config.data.path", path)
  opened = SourceArguments(
    path=path,
    split=split,
    image_size=to_size(image_size, "image_size"),
    channels=channels,
    max_unreadable=max_unreadable,
    image_bits=image_bits,
    cache=cache,
    arguments=arguments or {},
  )
  return entry.open(opened)


def _check_reads_buckets(name: str, path: str) -> None:
  """Raises SettingError if a source reads local files only."""
  if name != "latents":
    raise SettingError(
      "config.data.path",
      path,
      f"must be a local path: config.data.source = {name!r} reads no bucket, only "
      "'latents' does; encode the images with python -m mdt_jax.encode, copy the data "
      "to a local disk (gcloud storage cp -r), or mount the bucket",
    )
