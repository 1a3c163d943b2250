"""The set of `sets`, with arrays and captions beside the latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mdt_jax.data.image_arrays import open_image_arrays
from mdt_jax.data.latent_card import FORMAT_WITH_ARRAYS
from mdt_jax.data.latent_writer import write_latents
from tests.data import sets

NAMES = [f"class/{i}.png" for i in range(sets.NUM_IMAGES)]


def vector(index):
  """The array "clip" of image `index`, (5,) float16."""
  return np.random.default_rng(100 + index).standard_normal(5).astype(np.float16)


def mask(index):
  """The array "t5_mask" of image `index`, (2, 3) bool."""
  return np.arange(6).reshape(2, 3) <= index % 6


def caption(index):
  """The caption of image `index`; every fifth image has none."""
  return None if index % 5 == 0 else f"image {index}: ä"


def write_files(folder: Path) -> dict[str, Path]:
  """Writes clip.npz, t5_mask.npz and captions.json; returns the files of the arrays."""
  folder.mkdir(exist_ok=True)
  files = {name: folder / f"{name}.npz" for name in ("clip", "t5_mask")}
  for function, file in zip((vector, mask), files.values(), strict=True):
    np.savez(file, **{name: function(i) for i, name in enumerate(NAMES)})
  texts = {name: caption(i) for i, name in enumerate(NAMES) if caption(i)}
  (folder / "captions.json").write_text(json.dumps(texts))
  return files


def open_arrays(files, captions=None, missing="refuse"):
  def load(index):
    return sets.Images().load(index)["image"]

  return open_image_arrays(files, captions, missing, NAMES, load)


def write(output, arrays, source=None, encode=sets.encode_fn, **settings):
  """Writes the set with `arrays`, and returns its folder."""
  write_latents(
    sets.latent_set(output, format=FORMAT_WITH_ARRAYS, **arrays.card),
    source or sets.Images(),
    encode,
    batch_size=sets.BATCH_SIZE,
    arrays=arrays,
    **settings,
  )
  return output
