"""A small set of latents with known values, and functions that write it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from mdt_jax.buckets import is_bucket
from mdt_jax.data import latent_card
from mdt_jax.data.latent_set import LatentSet
from mdt_jax.data.latent_writer import write_latents
from mdt_jax.errors import SettingError
from mdt_jax.paths import absolute

LATENT_SHAPE = (4, 4, 3)
NUM_IMAGES, NUM_CLASSES, NUM_SHARDS = 24, 5, 3
BATCH_SIZE = 3


class Images:
  """Named 4x4x3 images, each filled with its index. Some are unreadable."""

  def __init__(self, unreadable=(), max_unreadable=10):
    self.files = self
    self._unreadable = unreadable
    self._max_unreadable = max_unreadable
    self.left_out = []

  def __len__(self):
    return NUM_IMAGES

  def name(self, index):
    return f"class/{index}.png"

  def load(self, index):
    if index in self._unreadable:
      raise OSError("truncated")
    image = np.full((4, 4, 3), index, np.uint8)
    return {"image": image, "label": np.int32(index % NUM_CLASSES)}

  def leave_out(self, index, error):
    self.left_out.append(index)
    if len(self.left_out) > self._max_unreadable:
      raise SettingError("config.data.max_unreadable", self._max_unreadable, "exceeded")


def views(index):
  """Moments of image `index` and of its mirror image, float16."""
  rng = np.random.default_rng(index)
  return rng.uniform(0.1, 2, (2, 2, *LATENT_SHAPE)).astype(np.float16)


def encode_fn(images):
  return np.stack([views(int(image[0, 0, 0])) for image in images])


def latent_set(folder, **changes):
  card = {
    "format": latent_card.FORMAT,
    "classes": [f"class {i}" for i in range(NUM_CLASSES)],
    "latent_shape": list(LATENT_SHAPE),
    "dtype": "float16",
    **changes,
  }
  folder = absolute(folder) if is_bucket(folder) else Path(folder)
  return LatentSet(folder, card, NUM_IMAGES, NUM_SHARDS)


def write(output, source=None, encode=encode_fn, **settings):
  write_latents(
    latent_set(output), source or Images(), encode, batch_size=BATCH_SIZE, **settings
  )
  return output


def write_slowly(output, process_index=0, process_count=1):
  """Writes the set slowly, so that a test can kill the process.

  Runs with `python -m tests.data.sets OUTPUT [PROCESS_INDEX PROCESS_COUNT]`.
  """

  def encode(images):
    time.sleep(0.03)
    return encode_fn(images)

  print("begun", flush=True)
  write(
    output,
    encode=encode,
    process_index=int(process_index),
    process_count=int(process_count),
  )


if __name__ == "__main__":
  write_slowly(*sys.argv[1:])
