"""The autoencoder against diffusers', and the ways to decode in less memory."""

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
  _tiles,
  decode,
  decode_in_slices,
  decode_in_tiles,
  encode,
)
from mdt_jax.pretrained.torch_vae import abstract_vae_params, load_vae
from tests import reference

# Four levels with attention, and two levels without it and without 1x1 convolutions.
FIXTURES = ("vae", "vae_no_quant")
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
ROUNDING = 1e-5  # of one network compiled for two batch sizes


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


# The network


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
  """As close as diffusers' own bfloat16 on these random weights: 0.04."""
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


def test_stable_diffusion_has_its_published_size():
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
def test_shapes_of_any_config(changes):
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
def test_attributes_of_no_network_are_named(name, value):
  with pytest.raises(SettingError, match=f"{name} = "):
    AutoencoderKL(**{**SMALL, name: value}).check()


# In slices


@functools.cache
def five_latents():
  shape = (5, *recorded("vae_no_quant", "z").shape[1:])
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("slice_size", [1, 2, 5, 8])
def test_slices_are_close_to_the_whole(slice_size):
  model, params = vae("vae_no_quant")
  sliced = decode_in_slices(model, params, five_latents(), slice_size)
  whole = np.asarray(decode(model, params, five_latents()))
  assert reference.relative_error(sliced, whole) < ROUNDING


@pytest.mark.parametrize("slice_size", [1, 2])
def test_slices_are_what_decode_makes_of_each(slice_size):
  """To the bit; another batch size is another convolution to XLA."""
  model, params = vae("vae_no_quant")
  z = five_latents()
  parts = [z[i : i + slice_size] for i in range(0, len(z), slice_size)]
  expected = np.concatenate([decode(model, params, part) for part in parts])
  sliced = decode_in_slices(model, params, z, slice_size)
  np.testing.assert_array_equal(sliced, expected)


def test_slice_of_nothing_is_refused():
  with pytest.raises(SettingError, match="slice_size = 0: "):
    decode_in_slices(*vae("vae_no_quant"), five_latents(), slice_size=0)


# In tiles


@functools.cache
def large_latents():
  shape = (1, 24, 20, 16)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.cache
def large_whole():
  return np.asarray(decode(*vae("vae_no_quant"), large_latents()))


@functools.cache
def in_tiles(tile_size, overlap):
  model, params = vae("vae_no_quant")
  return np.asarray(decode_in_tiles(model, params, large_latents(), tile_size, overlap))


def test_one_tile_is_the_whole():
  np.testing.assert_array_equal(in_tiles(24, 8), large_whole())


def test_tiles_are_close_to_the_whole():
  """GroupNorm sees one tile, and its edges are padded: not equal."""
  assert in_tiles(16, 8).shape == large_whole().shape
  assert rms_error(in_tiles(16, 8), large_whole()) < 0.1


def test_overlap_lessens_the_difference():
  errors = [rms_error(in_tiles(16, overlap), large_whole()) for overlap in (0, 4, 8)]
  assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_pixel_of_one_tile_alone_is_that_of_the_tile():
  model, params = vae("vae_no_quant")
  corner = np.asarray(decode(model, params, large_latents()[:, :16, :16]))
  # The second tiles start at 8 and at 4, in latents.
  error = reference.relative_error(in_tiles(16, 8)[:, :16, :8], corner[:, :16, :8])
  assert error < ROUNDING


@pytest.mark.parametrize(
  ("length", "tile_size", "overlap", "starts"),
  [
    (24, 24, 8, [0]),
    (20, 24, 8, [0]),
    (24, 16, 8, [0, 8]),
    (24, 16, 0, [0, 8]),
    (25, 16, 8, [0, 4, 9]),
    (64, 16, 4, [0, 12, 24, 36, 48]),
    (9, 8, 7, [0, 1]),
  ],
)
def test_tiles_cover_the_axis(length, tile_size, overlap, starts):
  actual, weights = _tiles(length, tile_size, overlap, factor=2)
  assert actual.tolist() == starts
  assert weights.shape == (len(starts), 2 * min(length, tile_size))
  sums = np.zeros(2 * length)
  for start, row in zip(actual.tolist(), weights, strict=True):
    sums[2 * start : 2 * start + len(row)] += row
  np.testing.assert_allclose(sums, 1, rtol=1e-6)


def test_tiles_fade_linearly_over_their_overlap():
  _, weights = _tiles(24, 16, 8, factor=1)
  fade = (np.arange(8) + 0.5) / 8
  np.testing.assert_allclose(weights[0], [1] * 8 + list(1 - fade), rtol=1e-6)
  np.testing.assert_allclose(weights[1], [*fade, *[1] * 8], rtol=1e-6)


@pytest.mark.parametrize("overlap", [-1, 16, 17])
def test_overlap_that_leaves_nothing_is_refused(overlap):
  with pytest.raises(SettingError, match=f"overlap = {overlap}: "):
    in_tiles(16, overlap)
