"""Released tensors of SPRINT: round trips, inferred sizes, and refused tensors."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.pretrained.torch_mdt import (
  attributes_of,
  from_tensors,
  from_torch,
  to_torch,
)
from tests import reference
from tests.pretrained.test_torch_mdt import released

PATH = reference.FIXTURES / "sprint.pt"
CONFIG = json.loads(str(reference.load("sprint")["config"]))
TINY = dict(input_size=8, num_classes=3, hidden_size=16, num_heads=2, depth=5)


@functools.cache
def read():
  return from_torch(PATH, input_size=12)


def expect_error(tensors, **known):
  with pytest.raises(SettingError) as error:
    from_tensors(tensors, source="there.pt", **known)
  assert "\n" not in str(error.value)
  return error.value


def test_round_trip_keeps_every_bit_of_the_reference():
  back = to_torch(*read())
  assert back.keys() == released("sprint").keys()
  for key, value in released("sprint").items():
    reference.assert_matches(
      "SPRINT, checkpoint converted there and back",
      back[key].view(np.uint8),
      value.view(np.uint8),
      0,
    )


def test_recorded_sizes_are_inferred():
  attributes, _ = read()
  expected = {
    "variant": "SPRINT",
    "input_size": CONFIG["context_size"],
    "encoder_depth": CONFIG["encoder_depth"],
    "decode_depth": CONFIG["decoder_depth"],
    "depth": sum(CONFIG[f"{part}_depth"] for part in ("encoder", "middle", "decoder")),
  }
  sizes = ("patch_size", "in_channels", "hidden_size", "num_heads", "num_classes")
  expected |= {name: CONFIG[name] for name in sizes}
  assert {name: attributes[name] for name in expected} == expected


def test_network_argument_may_name_the_variant():
  attributes, params = from_torch(PATH, "SPRINT", input_size=12)
  assert attributes == read()[0]
  jax.tree.map(np.testing.assert_array_equal, params, read()[1])


@pytest.mark.parametrize("network", ["DiT", "TREAD", "MDTv2"])
def test_sprint_is_no_other_network(network):
  error = expect_error(released("sprint"), network=network, input_size=12)
  assert (error.setting, error.value) == ("network", network)
  assert "must be SPRINT" in error.accepted


def test_dit_is_no_sprint():
  error = expect_error(released("dit"), network="SPRINT", num_heads=2)
  assert (error.setting, error.value) == ("network", "SPRINT")


def test_input_size_is_asked_for():
  error = expect_error(released("sprint"))
  assert (error.setting, error.value) == ("input_size", None)


@pytest.mark.parametrize("size", [0, -2, 11, 10**12])
def test_input_size_that_does_not_fit_is_refused(size):
  error = expect_error(released("sprint"), input_size=size)
  assert f"input_size = {size}" in str(error)


def test_same_tensors_are_a_network_of_another_input_size():
  attributes, params = from_torch(PATH, input_size=20)
  assert attributes == {**read()[0], "input_size": 20}
  jax.tree.map(np.testing.assert_array_equal, params, read()[1])


@pytest.mark.parametrize(
  "changes",
  [
    {"learn_sigma": True},
    {"label_dropout": 0.0},
    {"mlp_ratio": 1.5, "in_channels": 3, "encoder_depth": 1},
    {"patch_size": 4, "num_heads": 4},
  ],
)
def test_other_sizes_round_trip(changes):
  model = create_model(variant="SPRINT", **{**TINY, **changes})
  params = reference.random_params(model)
  tensors = to_torch(attributes_of(model), params)
  metadata = {"patch_size": model.patch_size}
  classes = {"num_classes": 3} if "label_dropout" in changes else {}
  attributes, again = from_tensors(tensors, input_size=8, metadata=metadata, **classes)
  assert create_model(**attributes) == model
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_patch_that_does_not_fit_is_refused():
  metadata = {"patch_size": 3}
  error = expect_error(released("sprint"), input_size=12, metadata=metadata)
  assert error.setting == "tensors" and "patch_size 3" in error.accepted


@pytest.mark.parametrize(
  "tensor",
  [
    "mask_token",
    "encoder_blocks.0.attn.q_norm.weight",
    "middle_blocks.2.mlp.fc2.bias",
    "decoder_blocks.1.attn.k_norm.weight",
    "x_embedder.proj.weight",
    "final_layer.linear.bias",
  ],
)
def test_error_names_a_missing_tensor(tensor):
  tensors = {key: value for key, value in released("sprint").items() if key != tensor}
  error = expect_error(tensors, input_size=12)
  assert error.setting == "tensors" and f"{tensor} is missing" in error.accepted


@pytest.mark.parametrize(
  ("tensor", "shape", "expected"),
  [
    ("x_embedder.proj.weight", (32, 4, 2, 2), None),
    ("renoise_linear.weight", (64, 32), (32, 64)),
    ("middle_blocks.1.attn.q_norm.weight", (8,), (16,)),
    ("mask_token", (32,), (1, 1, 32)),
  ],
)
def test_error_for_a_wrong_shape_names_the_tensor(tensor, shape, expected):
  tensors = {**released("sprint"), tensor: np.zeros(shape, np.float32)}
  error = expect_error(tensors, input_size=12)
  assert tensor in error.accepted and str(shape) in error.accepted
  assert expected is None or str(expected) in error.accepted


def test_unexpected_tensor_is_named():
  tensors = {**released("sprint"), "pos_embed": np.zeros((1, 36, 32), np.float32)}
  error = expect_error(tensors, input_size=12)
  assert error.accepted.endswith("pos_embed is unexpected")
