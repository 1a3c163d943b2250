"""TREAD: agreement with the released code (CompVis/tread) on a small random network."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.diffusion.guidance import guided
from mdt_jax.models.masking import random_token_mask, token_mask_from_noise
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained.torch_mdt import from_torch
from tests import reference

NUM_CLASSES = 10
RECORDED = reference.load("tread")
CONFIG = json.loads(str(RECORDED["config"]))
(ROUTE,) = CONFIG["routes"]
START, END = ROUTE["start_layer_idx"], ROUTE["end_layer_idx"]
TINY = dict(input_size=8, in_channels=4, num_classes=10, hidden_size=16, num_heads=2)


@functools.cache
def load_model(**overrides):
  attributes, params = from_torch(reference.FIXTURES / "tread.pt", "TREAD", num_heads=2)
  route = dict(route_start=START, route_end=END)
  return create_model(**{**attributes, **route, **overrides}), params


def images(name):
  return jnp.asarray(reference.to_nhwc(RECORDED[name]))


def recorded_mask():
  kept = RECORDED["route/ids_keep"].shape[1]
  return token_mask_from_noise(jnp.asarray(RECORDED["route/noise"]), kept)


@functools.cache
def routed(**overrides):
  """Output and intermediate values of the recorded pass with a route."""
  model, params = load_model(**overrides)
  run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
  output, state = run(
    {"params": params}, images("x"), RECORDED["t"], RECORDED["y"], recorded_mask()
  )
  return output, state["intermediates"]


def test_forward_matches_reference():
  model, params = load_model()
  output = jax.jit(model.apply)(
    {"params": params}, images("x"), RECORDED["t"], RECORDED["y"]
  )
  reference.assert_matches(
    "TREAD, forward pass",
    reference.to_nchw(output),
    RECORDED["out"],
    reference.FORWARD_TOLERANCE,
  )


def test_mask_keeps_the_recorded_tokens_in_their_order():
  np.testing.assert_array_equal(recorded_mask().ids_keep, RECORDED["route/ids_keep"])


@pytest.mark.parametrize(
  "options", [{"unroll": 1}, {"unroll": -1}, {"remat": "full"}, {"forward_mode": True}]
)
def test_routed_forward_matches_reference(options):
  output, _ = routed(**options)
  reference.assert_matches(
    "TREAD, forward pass with a route",
    reference.to_nchw(output),
    RECORDED["route/out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize(
  ("name", "key"), [("route_input", "before"), ("route_output", "after")]
)
def test_tokens_of_the_route_match_reference(name, key):
  _, found = routed()
  reference.assert_matches(
    "TREAD, tokens before and after the route",
    found[name][0],
    RECORDED[f"route/tokens_{key}"],
    reference.FORWARD_TOLERANCE,
  )


def test_guided_output_matches_reference():
  """All channels are guided."""
  model, params = load_model()

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  model_fn = guided(
    network,
    jnp.asarray(RECORDED["y"]),
    NUM_CLASSES,
    scale=float(RECORDED["cfg/scale"]),
    power=0.0,
    channels=None,
  )
  reference.assert_matches(
    "TREAD, guided output",
    reference.to_nchw(jax.jit(model_fn)(images("x"), RECORDED["t"])),
    RECORDED["cfg/out"],
    reference.FORWARD_TOLERANCE,
  )


# Properties.


def test_parameters_are_those_of_dit():
  attributes = {**TINY, "depth": 7, "learn_sigma": False}
  tread, dit = (
    abstract_params(create_model(variant=variant, **attributes))
    for variant in ("TREAD", "DiT")
  )
  assert tread == dit


def test_parameters_do_not_depend_on_the_mask():
  model = create_model("TREAD-S/2", **TINY, depth=7)
  x, y = jnp.zeros((1, 8, 8, 4)), jnp.array([0])
  mask = random_token_mask(jax.random.key(0), 1, 16, 8)
  with_mask = jax.eval_shape(model.init, jax.random.key(0), x, y, y, mask)["params"]
  assert with_mask == abstract_params(model)


def test_without_a_mask_the_network_is_dit():
  model, params = load_model()
  dit = create_model(
    variant="DiT",
    **{name: getattr(model, name) for name in (*TINY, "depth", "learn_sigma")},
  )
  outputs = [
    jax.jit(network.apply)(
      {"params": params}, images("x"), RECORDED["t"], RECORDED["y"]
    )
    for network in (model, dit)
  ]
  np.testing.assert_array_equal(*outputs)


def test_mask_of_all_tokens_changes_nothing():
  model, params = load_model()
  mask = random_token_mask(jax.random.key(0), 4, model.num_tokens, model.num_tokens)
  inputs = (images("x"), RECORDED["t"], RECORDED["y"])
  run = jax.jit(model.apply)
  np.testing.assert_allclose(
    run({"params": params}, *inputs, mask),
    run({"params": params}, *inputs),
    atol=1e-4 * np.abs(RECORDED["out"]).max(),
  )


def test_removed_tokens_have_no_influence_inside_the_route():
  """With all blocks on the route, the output of a kept token has only kept inputs."""
  model, params = load_model(route_start=0, route_end=6)
  mask = recorded_mask()
  kept = ~np.asarray(mask.removed)

  def output_of_kept(x):
    out = model.apply({"params": params}, x, RECORDED["t"], RECORDED["y"], mask)
    return jnp.where(as_pixels(kept), out**2, 0).sum()

  gradient = np.asarray(jax.jit(jax.grad(output_of_kept))(images("x")))
  shown = np.broadcast_to(as_pixels(kept), gradient.shape)
  assert (gradient[~shown] == 0).all()
  assert (gradient[shown] != 0).all()


def test_removed_tokens_leave_a_route_as_they_entered():
  _, found = routed()
  before, after = (np.asarray(found[f"route_{end}put"][0]) for end in ("in", "out"))
  removed = np.asarray(recorded_mask().removed)
  np.testing.assert_array_equal(after[removed], before[removed])
  assert (after[~removed] != before[~removed]).any(axis=-1).all()


def as_pixels(tokens):
  """(B, L) of patches of 2x2 pixels -> (B, H, W, 1)."""
  grid = np.asarray(tokens).reshape(len(tokens), 6, 6)
  return grid.repeat(2, axis=1).repeat(2, axis=2)[..., None]


@pytest.mark.parametrize(
  ("depth", "route"), [(12, range(2, 9)), (24, range(2, 21)), (28, range(2, 25))]
)
def test_default_route_is_the_released_one(depth, route):
  assert create_model("TREAD-B/2", depth=depth).route == route


@pytest.mark.parametrize(
  ("attributes", "setting", "value", "accepted"),
  [
    ({"route_start": 9}, "route_end", 8, "must lie in [route_start = 9, "),
    ({"route_start": -1}, "route_start", -1, "must lie in [0, depth - 1 = 11]"),
    ({"route_start": 12}, "route_start", 12, "must lie in [0, depth - 1 = 11]"),
    ({"route_end": 12}, "route_end", 12, "must lie in [route_start = 2, depth - 1"),
    ({"depth": 5}, "route_end", 1, "must lie in [route_start = 2, depth - 1 = 4]"),
  ],
)
def test_route_out_of_range_is_refused(attributes, setting, value, accepted):
  with pytest.raises(SettingError) as error:
    create_model("TREAD-B/2", **attributes)
  assert (error.value.setting, error.value.value) == (setting, value)
  assert error.value.accepted.startswith(accepted)
