"""Timestep and patch embeddings, compared with PyTorch."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mdt_jax.models.embeddings import PatchEmbed, timestep_frequencies
from mdt_jax.models.mdt import MDT
from mdt_jax.pretrained.torch_mdt import to_torch
from tests import reference

TIMES = (0, 1, 2, 17, 250, 500, 998, 999, 0.25, 0.5, 3.996, 333.333, 500.5, 998.001)
# One unit in the last place of a float32 frequency below 1. The angle is t times it.
ANGLE_ERROR = 2**-24


def our_waves(t):
  return np.asarray(timestep_frequencies(jnp.array([t], jnp.float32)))[0]


def torch_waves(t):
  """The timestep frequencies of the released code, in float32."""
  exponents = -math.log(10_000) * torch.arange(0, 128, dtype=torch.float32) / 128
  angles = torch.tensor([t], dtype=torch.float32)[:, None] * torch.exp(exponents)
  return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).numpy()[0]


def exact_waves(t):
  angles = np.float64(np.float32(t)) * 10_000.0 ** (-np.arange(128) / 128)
  return np.concatenate([np.cos(angles), np.sin(angles)])


@pytest.mark.parametrize("t", TIMES)
def test_timestep_frequencies_match_pytorch_to_the_last_bit(t):
  atol = 2 * ANGLE_ERROR * max(t, 1)
  np.testing.assert_allclose(our_waves(t), torch_waves(t), rtol=0, atol=atol)


@pytest.mark.parametrize("t", TIMES)
def test_timestep_frequencies_match_float64_to_the_last_bit(t):
  atol = 2 * ANGLE_ERROR * max(t, 1)
  np.testing.assert_allclose(our_waves(t), exact_waves(t), rtol=0, atol=atol)


@pytest.mark.parametrize("t", [250, 500.5, 999])
def test_nearly_all_frequencies_equal_pytorch(t):
  """PyTorch rounds two of 128 differently. XLA's float32 exp would change dozens."""
  differs = np.abs(our_waves(t) - torch_waves(t)) > 2e-6
  assert differs.reshape(2, 128).any(axis=0).sum() <= 4


def patch_error(images, params, weight, bias):
  """Relative error of PatchEmbed against a PyTorch convolution of stride p."""
  ours = PatchEmbed(weight.shape[-1], len(weight)).apply({"params": params}, images)
  theirs = torch.nn.functional.conv2d(
    torch.tensor(reference.to_nchw(images)),
    torch.tensor(weight),
    torch.tensor(bias),
    stride=weight.shape[-1],
  )
  theirs = theirs.flatten(2).transpose(1, 2).numpy()
  return reference.relative_error(ours, theirs)


def random_images(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_released_patch_embedding_matches_pytorch_convolution(name):
  released = torch.load(reference.FIXTURES / f"{name}.pt", weights_only=True)
  error = patch_error(
    random_images(2, 12, 12, 4),
    reference.load_model(name)[1]["patch_embed"],
    released["x_embedder.proj.weight"].numpy(),
    released["x_embedder.proj.bias"].numpy(),
  )
  assert error < 1e-6


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 4), (2, 1), (3, 3), (4, 4)])
def test_patch_embedding_matches_pytorch_convolution(patch_size, channels):
  config = dict(
    variant="DiT",
    input_size=2 * patch_size,
    patch_size=patch_size,
    in_channels=channels,
    hidden_size=8,
    depth=1,
    num_heads=1,
    num_classes=1,
  )
  params = reference.random_params(MDT(**config))
  tensors = to_torch(config, params)
  error = patch_error(
    random_images(2, 2 * patch_size, 3 * patch_size, channels),  # Not square.
    params["patch_embed"],
    tensors["x_embedder.proj.weight"],
    tensors["x_embedder.proj.bias"],
  )
  assert error < 1e-6
