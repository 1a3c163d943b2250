"""AutoencoderKL, compared with diffusers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError
from mdt_jax.models.autoencoder_kl import (
  LOGVAR_RANGE,
  AutoencoderKL,
  decode,
  encode,
)
from mdt_jax.pretrained.torch_vae import abstract_vae_params, load_vae
from tests import reference

# Four levels with attention, and two levels without it and without 1x1 convolutions.
FIXTURES = ("vae", "vae_no_quant")
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
ROUNDING = 1e-5  # Difference of one network compiled for two batch sizes.


@functools.cache
def vae(name, dtype=jnp.float32):
  return load_vae(reference.FIXTURES / name, dtype)


def recorded(name, key):
  return reference.to_nhwc(reference.load(name)[key])


@functools.cache
def encoded(name, dtype=jnp.float32):
  mean, logvar = encode(*vae(name, dtype), recorded(name, "x"))
  return {"mean": mean, "logvar": logvar}


@functools.cache
def decoded(name, dtype=jnp.float32):
  return decode(*vae(name, dtype), recorded(name, "z"))


def rms_error(actual, expected):
  return float(np.sqrt(np.mean((actual - expected) ** 2) / np.var(expected)))


# The network.


@pytest.mark.parametrize("moment", ["mean", "logvar"])
@pytest.mark.parametrize("name", FIXTURES)
def test_encode_matches_reference(name, moment):
  reference.assert_matches(
    f"autoencoder ({name}), {moment} of the posterior",
    encoded(name)[moment],
    recorded(name, moment),
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("name", FIXTURES)
def test_decode_matches_reference(name):
  reference.assert_matches(
    f"autoencoder ({name}), decoded images",
    decoded(name),
    recorded(name, "decoded"),
    reference.FORWARD_TOLERANCE,
  )


def test_bfloat16_is_close_to_float32():
  """The error of diffusers in bfloat16 is 0.04 on these random weights."""
  actual = encoded("vae", jnp.bfloat16) | {"decoded": decoded("vae", jnp.bfloat16)}
  errors = {key: rms_error(actual[key], recorded("vae", key)) for key in actual}
  assert max(errors.values()) < 0.05, errors


def test_bfloat16_returns_float32():
  outputs = [*encoded("vae", jnp.bfloat16).values(), decoded("vae", jnp.bfloat16)]
  assert {output.dtype.name for output in outputs} == {"float32"}


def test_parameters_of_a_bfloat16_model_are_float32():
  params = abstract_vae_params(AutoencoderKL(**SMALL, dtype=jnp.bfloat16))
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_log_variance_is_clipped():
  model, params = vae("vae_no_quant")
  conv_out = params["encoder"]["conv_out"]
  bias = np.full_like(conv_out["bias"], 100)
  bias[-1] = -100
  encoder = {**params["encoder"], "conv_out": {**conv_out, "bias": bias}}
  params = {**params, "encoder": encoder}
  _, logvar = encode(model, params, recorded("vae_no_quant", "x"))
  low, high = LOGVAR_RANGE
  assert set(np.unique(logvar[..., -1])) == {low}
  assert set(np.unique(logvar[..., :-1])) == {high}


def test_default_has_the_parameter_count_of_stable_diffusion():
  leaves = jax.tree.leaves(abstract_vae_params(AutoencoderKL()))
  assert sum(leaf.size for leaf in leaves) == 83_653_863


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(block_out_channels=(8,)),
    dict(block_out_channels=(16, 8, 4), layers_per_block=3),
    dict(latent_channels=16, use_quant_conv=False),
    dict(in_channels=1, out_channels=2, mid_block_attention=False),
  ],
)
def test_encode_and_decode_have_the_expected_shapes(changes):
  model = AutoencoderKL(**{**SMALL, **changes})
  params = abstract_vae_params(model)
  images = jax.ShapeDtypeStruct((3, 16, 24, model.in_channels), jnp.float32)
  mean, logvar = jax.eval_shape(functools.partial(encode, model), params, images)
  back = jax.eval_shape(functools.partial(decode, model), params, mean)
  h, w = 16 // model.downsampling, 24 // model.downsampling
  assert mean.shape == logvar.shape == (3, h, w, model.latent_channels)
  assert back.shape == (3, 16, 24, model.out_channels)


def test_scale_subtracts_the_shift_first():
  model = AutoencoderKL(scaling_factor=0.5, shift_factor=2.0)
  np.testing.assert_allclose(model.scale(np.array([2.0, 6.0])), [0.0, 2.0])


def test_unscale_is_the_inverse_of_scale():
  model, _ = vae("vae_no_quant")
  latents = np.linspace(-3, 3, 7)
  np.testing.assert_allclose(model.unscale(model.scale(latents)), latents)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("block_out_channels", ()),
    ("block_out_channels", (8, 6)),
    ("block_out_channels", (8, 0)),
    ("block_out_channels", (8, "8")),
    ("layers_per_block", 0),
    ("latent_channels", 4.0),
    ("norm_num_groups", 0),
    ("scaling_factor", 0),
    ("shift_factor", "0"),
  ],
)
def test_error_names_an_invalid_attribute(name, value):
  with pytest.raises(SettingError, match=f"{name} = "):
    AutoencoderKL(**{**SMALL, name: value}).check()
