"""The registry of data sources: what `config.data.source` accepts.

To add a source, write a file with a class that follows `examples.Source` and a function
that opens it from `SourceArguments`, and add one line to `SOURCES`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from mdt_jax.data.arrays import open_arrays
from mdt_jax.data.digits import DigitsSource, open_digits
from mdt_jax.data.examples import Source, SourceArguments, Subset, split_indices
from mdt_jax.data.images import open_images
from mdt_jax.data.latents import open_latents
from mdt_jax.data.memory import MemorySource
from mdt_jax.data.npz import open_npz
from mdt_jax.errors import SettingError, check_choice

__all__ = [
  "SOURCES",
  "DigitsSource",
  "MemorySource",
  "Source",
  "SourceEntry",
  "Subset",
  "create_source",
  "split_indices",
]


class SourceEntry(NamedTuple):
  """A kind of source.

  Attributes:
    open: opens it; raises SettingError if it cannot.
    pixels: whether its examples are pixels; otherwise they are latents.
    path: what `config.data.path` must be; None for a source without a path.
  """

  open: Callable[[SourceArguments], Source]
  pixels: bool
  path: str | None


SOURCES: dict[str, SourceEntry] = {
  "digits": SourceEntry(open_digits, True, None),
  "images": SourceEntry(
    open_images, True, "a folder of images, .tar files or tfds:NAME"
  ),
  "latents": SourceEntry(open_latents, False, "an output of python -m mdt_jax.encode"),
  # The name of the source says whether a file holds pixels, and not the file: sampling
  # from a checkpoint needs to know that where the data is not there.
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
  image_size: int,
  channels: int,
  max_unreadable: int,
) -> Source:
  """Opens a source by the name that `config.data.source` gives it.

  Args:
    name: a key of SOURCES.
    path: of the images (see `files.open_files`) or of a latent set; ignored for digits.
    split: of a TFDS data set.
    image_size: height and width of the examples; 8 for digits.
    channels: of the examples; 1 for digits.
    max_unreadable: how many examples may be unreadable.

  Raises:
    SettingError: unknown name; no path for a source that needs one; a size or number
      of channels that the source does not have; what the source itself refuses.
  """
  check_choice("config.data.source", name, SOURCES)
  entry = SOURCES[name]
  if entry.path is not None and not path:
    raise SettingError("config.data.path", path, f"must be given: {entry.path}")
  arguments = SourceArguments(
    path=os.fspath(path) if path else "",
    split=split,
    image_size=image_size,
    channels=channels,
    max_unreadable=max_unreadable,
  )
  return entry.open(arguments)
