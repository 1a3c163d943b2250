"""Helpers that write small images and arrays and open them as sources."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mdt_jax.data.arrays import ArraySource
from mdt_jax.data.files import ARRAY_EXTENSIONS, open_files
from mdt_jax.data.images import ImageSource

SIZE = 8


def write_image(path, value=0, size=(SIZE, SIZE), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def write_array(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, array)


def open_folder(path, image_size=SIZE, channels=3, max_unreadable=10):
  return ImageSource(open_files(path), image_size, channels, max_unreadable)


def open_arrays(path, image_size=4, channels=4, max_unreadable=10):
  files = open_files(path, extensions=ARRAY_EXTENSIONS)
  return ArraySource(files, image_size, channels, max_unreadable)


def labels(source):
  return [int(example["label"]) for example in source]


def values(source):
  return [int(example["image"].flat[0]) for example in source]
