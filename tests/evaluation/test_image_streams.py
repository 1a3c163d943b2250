"""Streams of images to score: from files, from a data set, from a sampler."""

from __future__ import annotations

import functools
import tracemalloc
import zipfile

import numpy as np
import pytest

from mdt_jax.data.sources import DigitsSource
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.image_streams import (
  GeneratedImages,
  NpzImages,
  SourceImages,
)
from mdt_jax.experiment import build
from mdt_jax.sampling.conditions import Conditions
from mdt_jax.sampling.generator import make_generator
from tests import reference
from tests.training.tiny import tiny_config


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def read(stream, batch_size):
  batches = list(stream.batches(batch_size))
  images = np.concatenate([images for images, _ in batches])
  labels = [labels for _, labels in batches]
  return images, None if labels[0] is None else np.concatenate(labels)


# Files.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_stream_returns_the_images_and_labels_of_the_file(tmp_path, save, batch_size):
  images, labels = noise(11, 6, 5, 3), np.arange(11)
  save(tmp_path / "a.npz", images, labels)
  stream = NpzImages(tmp_path / "a.npz")
  found, found_labels = read(stream, batch_size)
  np.testing.assert_array_equal(found, images)
  np.testing.assert_array_equal(found_labels, labels)
  assert found.dtype == np.uint8
  assert len(stream) == 11


def test_file_without_labels_can_be_read_twice(tmp_path):
  np.savez(tmp_path / "a.npz", noise(3, 4, 4, 1))
  stream = NpzImages(tmp_path / "a.npz")
  for _ in range(2):
    images, labels = read(stream, 2)
    np.testing.assert_array_equal(images, noise(3, 4, 4, 1))
    assert labels is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_images_are_read_as_float32(tmp_path, dtype):
  images = noise(5, 4, 4, 3).astype(dtype)
  np.savez(tmp_path / "a.npz", images)
  found, _ = read(NpzImages(tmp_path / "a.npz"), 2)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, images)


def test_stream_does_not_hold_the_whole_file_in_memory(tmp_path):
  images = noise(400, 64, 64, 3)
  np.savez_compressed(tmp_path / "a.npz", images)
  stream = NpzImages(tmp_path / "a.npz")
  tracemalloc.start()
  for _ in stream.batches(4):
    pass
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < images.nbytes / 10


def with_pixel(value, at=2):
  images = noise(4, 4, 4, 3).astype(np.float32)
  images[at, 1, 2, 0] = value
  return images


BAD = {
  "pickled objects": (np.array([None, {}]), "holds pickled objects"),
  "another type": (noise(4, 4, 4, 3).astype(np.int64), "is of int64; accepted are"),
  "another rank": (noise(4, 4, 3), r"has shape \(4, 4, 3\); accepted is"),
  "channels first": (noise(4, 3, 8, 8), r"has shape \(4, 3, 8, 8\); accepted is"),
  "Fortran order": (np.asfortranarray(noise(4, 4, 4, 3)), "Fortran order"),
  "NaN": (with_pixel(np.nan), "image 2 holds numbers from nan to nan"),
  "infinity": (with_pixel(np.inf, at=3), "image 3 holds .* to inf"),
  "too large": (with_pixel(256), "image 2 holds numbers from .* to 256"),
  "negative": (with_pixel(-1), "image 2 holds numbers from -1"),
  "zero to one": (noise(4, 4, 4, 3) / 255, r"lie in \[0, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_image_array_is_refused(tmp_path, case):
  array, message = BAD[case]
  np.savez(tmp_path / "a.npz", array)
  with pytest.raises(SettingError, match=rf"^path = .*a\.npz': .*{message}"):
    read(NpzImages(tmp_path / "a.npz"), 2)


@pytest.mark.parametrize(
  "labels", [np.arange(3), np.ones(4), np.array([None] * 4), np.ones((4, 1), int)]
)
def test_invalid_labels_are_refused(tmp_path, labels):
  np.savez(tmp_path / "a.npz", noise(4, 4, 4, 3), labels)
  with pytest.raises(SettingError, match=r"^path = .*arr_1"):
    NpzImages(tmp_path / "a.npz")


def test_file_without_arr_0_is_refused(tmp_path):
  np.savez(tmp_path / "a.npz", images=noise(4, 4, 4, 3))
  with pytest.raises(SettingError, match="holds no array arr_0"):
    NpzImages(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_missing_or_invalid_file_is_refused(tmp_path, content):
  if content is not None:
    (tmp_path / "a.npz").write_bytes(content)
  with pytest.raises(SettingError, match=r"^--reference = "):
    NpzImages(tmp_path / "a.npz", "--reference")


def test_error_for_a_truncated_file_gives_the_image_count(tmp_path):
  """The header declares five images. The file holds a little more than three."""
  shape = (5, 4, 4, 3)
  with (
    zipfile.ZipFile(tmp_path / "a.npz", "w") as archive,
    archive.open("arr_0.npy", "w") as member,
  ):
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    member.write(noise(*shape).tobytes()[: 3 * 48 + 7])
  with pytest.raises(SettingError, match="cut off after 3 of 5 images"):
    read(NpzImages(tmp_path / "a.npz"), 2)


def test_damaged_file_is_refused(tmp_path):
  np.savez_compressed(tmp_path / "a.npz", noise(40, 8, 8, 3))
  data = bytearray((tmp_path / "a.npz").read_bytes())
  data[2000:2100] = bytes(100)
  (tmp_path / "a.npz").write_bytes(data)
  with pytest.raises(SettingError, match=r"^path = .*readable"):
    read(NpzImages(tmp_path / "a.npz"), 4)


# The data set of a run.


@pytest.mark.parametrize("count", [7, 5000])
def test_source_images_are_spread_evenly_over_the_data_set(count):
  digits = DigitsSource()
  images, labels = read(SourceImages(digits, count), 300)
  indices = np.linspace(0, 1796, min(count, 1797)).round().astype(int)
  np.testing.assert_array_equal(images, [digits[i]["image"] for i in indices])
  np.testing.assert_array_equal(labels, [digits[i]["label"] for i in indices])


def test_latent_data_set_is_refused_as_reference():
  examples = [{"views": np.zeros((2, 2, 4, 4, 4)), "label": 0}]
  with pytest.raises(SettingError, match=r"^reference = None: must be given"):
    read(SourceImages(examples, 1), 1)


# Generated images.


@functools.cache
def drawn(batch_size, seed=0):
  experiment = build(tiny_config())
  stream = GeneratedImages(
    experiment.model,
    make_generator(experiment.model, experiment.sampler),
    reference.random_params(experiment.model),
    Conditions(np.arange(11) % 10, np.arange(11) % 10, [""] * 11),
    seed=seed,
    holds_pixels=True,
  )
  return read(stream, batch_size)


def test_generated_images_do_not_depend_on_the_batch_size():
  """Each batch size compiles its own program, which may round pixels differently."""
  whole, parts = (drawn(size)[0].astype(int) for size in (11, 4))
  assert np.abs(whole - parts).max() <= 1


def test_generated_images_have_the_given_labels():
  assert drawn(11)[1].tolist() == [*range(10), 0]


def test_generated_images_are_uint8():
  images, _ = drawn(11)
  assert images.dtype == np.uint8
  assert images.shape == (11, 8, 8, 1)


def test_another_seed_generates_different_images():
  assert (drawn(11)[0] != drawn(11, seed=1)[0]).mean() > 0.1


def test_generating_latents_without_an_autoencoder_is_refused():
  with pytest.raises(SettingError, match=r"config\.data\.vae = None: must be given"):
    GeneratedImages(None, None, None, None, holds_pixels=False)
