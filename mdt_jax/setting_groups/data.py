"""Settings of the training data."""

from __future__ import annotations

import dataclasses
from typing import Any

from mdt_jax.errors import SettingError
from mdt_jax.setting_groups.checks import at_least


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The training data, and the autoencoder between images and latents."""

  # latents (written by mdt_jax.encode), images (decoded while training), npz (uint8
  # images in one file), arrays (float arrays), digits (8x8 pixels, bundled) or
  # relations (generated images whose parts obey exact relations).
  source: str = "latents"
  # Where the data is. latents: folder of the set; images: a folder of images or .tar
  # files, a .tar file or tfds:NAME; npz: an .npz or .npy file; arrays: a folder of .npy
  # files, an .npz or .npy file; digits and relations: None. Only latents may be in a
  # bucket, gs://….
  path: str | None = None
  # More settings of the source relations: '{"grid": 8, "near_pairs": 4}'. See
  # docs/data.md.
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  # Folder on a local disk that receives a copy of latents in a bucket, before training:
  # each host needs room for the whole set (docs/data.md). Needed if `path` is gs://…;
  # without effect on a local path.
  cache: str | None = None
  # Split of a tfds: data set.
  split: str = "train"
  # Bits of the values in image files of more than 8 bits, in [8, 16]: the value
  # 2**image_bits - 1 is white. Cameras and scanners store 10, 12 or 14 bits in 16.
  image_bits: int = 16
  # Share of the examples that is held out of training, in [0, 0.5].
  validation: float = 0.0
  # Autoencoder, a folder or the id of one on the Hugging Face hub. It encodes the
  # images of the sources images and npz, and decodes sampled latents. None: no
  # autoencoder; the network works on pixels, or samples stay latents.
  vae: str | None = None
  # Whether to mirror each image left to right with probability 1/2. The source arrays
  # is never mirrored.
  flip: bool = True
  # Unreadable examples that each reading process skips; one more stops the run.
  max_unreadable: int = 100
  # Processes that read examples, at least 0; 0: threads of the training process.
  num_workers: int = 0
  # Batches read at the same time, at least 0; 0: reads in the thread that trains.
  num_threads: int = 8

  def check(self) -> None:
    for name in ("max_unreadable", "num_threads", "num_workers"):
      at_least(self, name, 0)
    if not 8 <= self.image_bits <= 16:
      raise SettingError("image_bits", self.image_bits, "must lie in [8, 16]")
