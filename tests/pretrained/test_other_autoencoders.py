"""Autoencoders beyond the shape of Stable Diffusion's, compared with PyTorch."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mdt_jax import SettingError
from mdt_jax.models.autoencoder_kl import AutoencoderKL
from mdt_jax.pretrained.autoencoder import Autoencoder
from mdt_jax.pretrained.torch_vae import abstract_vae_params, vae_to_torch
from tests import reference
from tests.pretrained.vae_reference import Reference

MEANS = [0.7, -1.2, 0.3, 2.5]
STDS = [1.5, 0.4, 3.0, 0.9]
CHANGES = {
  # SDXL of Playground: mean and standard deviation of each channel.
  "statistics": dict(latents_mean=MEANS, latents_std=STDS, scaling_factor=0.5),
  # SD3 and Flux: 16 channels, shift, no 1x1 convolutions.
  "sixteen": dict(
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
  ),
  "one_level": dict(block_out_channels=[8], layers_per_block=1),
  "deep": dict(block_out_channels=[4, 8, 12], layers_per_block=3, norm_num_groups=4),
  "grey": dict(in_channels=1, out_channels=1, mid_block_add_attention=False),
  "narrowing": dict(block_out_channels=[16, 8], use_quant_conv=False),
}


def config_of(name):
  config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "force_upcast": True,
    "sample_size": 64,
    **CHANGES[name],
  }
  levels = len(config["block_out_channels"])
  config["down_block_types"] = ["DownEncoderBlock2D"] * levels
  config["up_block_types"] = ["UpDecoderBlock2D"] * levels
  return config


def random_tensors(config):
  """Random weights, with their names and shapes in diffusers."""
  model = AutoencoderKL(
    in_channels=config["in_channels"],
    out_channels=config["out_channels"],
    block_out_channels=tuple(config["block_out_channels"]),
    layers_per_block=config["layers_per_block"],
    latent_channels=config["latent_channels"],
    norm_num_groups=config["norm_num_groups"],
    mid_block_attention=config["mid_block_add_attention"],
    use_quant_conv=config["use_quant_conv"],
    use_post_quant_conv=config["use_post_quant_conv"],
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (
      rng.standard_normal(leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    ).astype(np.float32),
    abstract_vae_params(model),
  )
  return vae_to_torch(params)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  """Returns a function: name -> (Autoencoder, Reference, config)."""

  @functools.cache
  def open_one(name):
    folder, config = tmp_path_factory.mktemp(name), config_of(name)
    tensors = random_tensors(config)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return Autoencoder.load(str(folder)), Reference(tensors, config), config

  return open_one


def by_channel(values, default, config):
  values = [default] * config["latent_channels"] if values is None else values
  return np.array(values, np.float32)[:, None, None]


def scales(config):
  """(shift, scale), (C, 1, 1) each: scaled latents are (z - shift) * scale."""
  shift = config["latents_mean"]
  shift = by_channel(shift, config["shift_factor"] or 0.0, config)
  std = by_channel(config["latents_std"], 1.0, config)
  return shift, config["scaling_factor"] / std


def images(config):
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (2, config["in_channels"], 16, 24)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_moments_match_the_scaled_moments_of_diffusers(name, opened):
  autoencoder, theirs, config = opened(name)
  mean, logvar = theirs.encode(images(config))
  shift, scale = scales(config)
  moments = np.asarray(autoencoder.moments(reference.to_nhwc(images(config))))
  ours_mean, ours_std = (reference.to_nchw(part) for part in np.moveaxis(moments, 1, 0))
  tolerance = reference.FORWARD_TOLERANCE
  assert reference.relative_error(ours_mean, (mean - shift) * scale) < tolerance
  assert reference.relative_error(ours_std, np.exp(logvar / 2) * scale) < tolerance


@pytest.mark.parametrize("name", CHANGES)
def test_decoded_latents_match_those_of_diffusers(name, opened):
  autoencoder, theirs, config = opened(name)
  mean, _ = theirs.encode(images(config))
  latents = np.random.default_rng(2).standard_normal(mean.shape).astype(np.float32)
  shift, scale = scales(config)
  expected = theirs.decode(latents / scale + shift)
  decoded = reference.to_nchw(autoencoder.decode(reference.to_nhwc(latents)))
  assert reference.relative_error(decoded, expected) < reference.FORWARD_TOLERANCE


@pytest.mark.parametrize("name", CHANGES)
def test_unscale_inverts_scale(name, opened):
  model = opened(name)[0].model
  latents = np.random.default_rng(3).standard_normal((2, 3, 3, model.latent_channels))
  latents = latents.astype(np.float32)
  np.testing.assert_allclose(model.unscale(model.scale(latents)), latents, atol=1e-5)


@pytest.mark.parametrize("name", ["statistics", "sixteen"])
def test_latent_set_of_another_scale_is_refused(name, opened):
  autoencoder = opened(name)[0]
  card = {"vae": "other", **autoencoder.scales()}
  autoencoder.check_scale("mine", card)
  changed = "latents_std" if name == "statistics" else "shift_factor"
  with pytest.raises(SettingError, match=f"must have {changed} = "):
    autoencoder.check_scale("mine", {**card, changed: 7.0})


def test_card_of_an_older_latent_set_fits_an_autoencoder_without_statistics():
  autoencoder = Autoencoder.load(str(reference.FIXTURES / "vae"))
  card = {"vae": "old", "scaling_factor": 0.18215, "shift_factor": 0.0}
  autoencoder.check_scale("mine", card)
