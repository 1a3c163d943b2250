"""Autoencoder: scaled moments, decoding, its parameters in a checkpoint."""

from __future__ import annotations

import functools

import numpy as np
import orbax.checkpoint as ocp

from mdt_jax import sharding
from mdt_jax.pretrained.autoencoder import Autoencoder
from tests import forked, reference

FOLDER = reference.FIXTURES / "vae"
RECORDED = {k: reference.to_nhwc(reference.load("vae")[k]) for k in ("x", "z")}


@functools.cache
def load():
  return Autoencoder.load(str(FOLDER))


def test_moments_match_the_scaled_reference():
  recorded = reference.load("vae")
  mean, std = np.moveaxis(np.asarray(load().moments(RECORDED["x"])), 1, 0)
  expected = 0.18215 * reference.to_nhwc(recorded["mean"])
  assert reference.relative_error(mean, expected) < reference.FORWARD_TOLERANCE
  expected = 0.18215 * np.exp(reference.to_nhwc(recorded["logvar"]) / 2)
  assert reference.relative_error(std, expected) < reference.FORWARD_TOLERANCE


def test_uint8_and_float_images_have_equal_moments():
  pixels = np.random.default_rng(0).integers(0, 256, RECORDED["x"].shape, np.uint8)
  floats = pixels.astype(np.float32) / 127.5 - 1
  # XLA may fuse the scaling of uint8 images and round once less.
  np.testing.assert_allclose(load().moments(pixels), load().moments(floats), atol=1e-6)


def test_decode_of_scaled_latents_matches_reference():
  images = load().decode(0.18215 * RECORDED["z"])
  expected = reference.to_nhwc(reference.load("vae")["decoded"])
  assert reference.relative_error(images, expected) < reference.FORWARD_TOLERANCE


def test_latent_shape_matches_the_moments():
  size = RECORDED["x"].shape[1]
  assert load().moments(RECORDED["x"]).shape[2:] == load().latent_shape(size)


def test_parameters_restored_by_orbax_match_reference(tmp_path):
  saved = load()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "vae", saved.params)
    checkpointer.wait_until_finished()
    params = checkpointer.restore(tmp_path / "vae", saved.params)
  restored = Autoencoder(saved.model, params)
  reference.assert_matches(
    "autoencoder, decode after a round trip through a checkpoint",
    restored.decode(0.18215 * RECORDED["z"]),
    reference.to_nhwc(reference.load("vae")["decoded"]),
    reference.FORWARD_TOLERANCE,
  )


def decode_on_four_devices(latents, path):
  autoencoder = Autoencoder.load(FOLDER)
  with sharding.use_mesh(sharding.make_mesh(data=2, tensor=2)):
    shared, odd = autoencoder.decode(latents), autoencoder.decode(latents[:3])
  assert shared.sharding.shard_shape(shared.shape)[0] == 2
  np.savez(path, shared, odd)


def test_decoding_on_four_devices_matches_one_device(tmp_path):
  latents = np.random.default_rng(0).normal(size=(4, *RECORDED["z"].shape[1:]))
  latents = latents.astype(np.float32)
  path = tmp_path / "decoded.npz"
  process = forked.Forked(decode_on_four_devices, latents, path, num_devices=4)
  assert process.end() == 0, process.err
  expected = load().decode(latents)
  with np.load(tmp_path / "decoded.npz") as decoded:
    np.testing.assert_allclose(decoded["arr_0"], expected, atol=1e-5)
    np.testing.assert_allclose(decoded["arr_1"], expected[:3], atol=1e-5)
