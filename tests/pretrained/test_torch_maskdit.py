"""Released tensors of MaskDiT: round trips, inferred sizes, and refusals."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
import torch

from mdt_jax import SettingError
from mdt_jax.models.registry import create_model
from mdt_jax.pretrained.adaptation import Adaptation
from mdt_jax.pretrained.tensors import write_tensors
from mdt_jax.pretrained.torch_mdt import (
  attributes_of,
  from_tensors,
  from_torch,
  to_torch,
)
from mdt_jax.pretrained.torch_mdt_sizes import describe_fully, notes
from tests import reference

PATH = reference.FIXTURES / "maskdit.pt"
HEADS = dict(num_heads=2, decoder_num_heads=2)
TINY = dict(input_size=4, num_classes=3, hidden_size=8, num_heads=2, depth=1)
TINY |= dict(decode_depth=3, decoder_hidden_size=12, decoder_num_heads=3)


@functools.cache
def released():
  """Tensors without the prefix "model."."""
  tensors = torch.load(PATH, weights_only=True)
  return {name.removeprefix("model."): t.numpy() for name, t in tensors.items()}


def expect_error(function, *args, **kwargs):
  with pytest.raises(SettingError) as caught:
    function(*args, **kwargs)
  assert "\n" not in str(caught.value)
  return caught.value


@pytest.mark.parametrize("network", [None, "MaskDiT"])
def test_round_trip_keeps_every_bit_of_the_reference(network):
  attributes, params = from_torch(PATH, network, **HEADS)
  back = to_torch(attributes, params)
  assert attributes["variant"] == "MaskDiT" and back.keys() == released().keys()
  for name, value in released().items():
    assert back[name].dtype == value.dtype
    reference.assert_matches(
      "MaskDiT, checkpoint converted there and back",
      back[name].view(np.uint8),
      value.view(np.uint8),
      0,
    )


def test_recorded_sizes_are_inferred():
  config = json.loads(str(reference.load("maskdit")["config"]))
  found, _ = from_torch(PATH, **HEADS)
  shared = config.keys() & found.keys()
  assert {name: found[name] for name in shared} == {n: config[n] for n in shared}
  assert {"depth", "decoder_hidden_size", "num_classes", "learn_sigma"} <= shared
  assert found["decode_depth"] == config["decoder_depth"]


@pytest.mark.parametrize(
  "attributes",
  [
    {},
    {"learn_sigma": True, "mlp_ratio": 1.5},
    {"in_channels": 1, "patch_size": 4},
    {"label_dropout": 0.0},
  ],
)
def test_own_file_survives_a_round_trip(attributes, tmp_path):
  """Its notes state what the tensors do not show."""
  model = create_model("MaskDiT-S/2", **TINY, **attributes)
  own, params = attributes_of(model), reference.random_params(model)
  path = tmp_path / "model.safetensors"
  write_tensors(path, to_torch(own, params), notes(own))
  found, again = from_torch(path)
  assert create_model(**found) == model
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_released_decoder_has_16_heads():
  sizes = {**TINY, "decoder_hidden_size": 512, "decoder_num_heads": 16}
  model = create_model("MaskDiT-S/2", **sizes)
  tensors = to_torch(attributes_of(model), reference.random_params(model))
  assert from_tensors(tensors, num_heads=2)[0]["decoder_num_heads"] == 16


@pytest.mark.parametrize("missing", HEADS)
def test_heads_of_unpublished_widths_are_asked_for(missing):
  error = expect_error(from_torch, PATH, **{**HEADS, missing: None})
  assert (error.setting, error.value) == (missing, None)
  assert error.accepted == "must be given for a MaskDiT of unpublished width"


@pytest.mark.parametrize(
  ("known", "setting"),
  [
    ({"decode_depth": 2}, "decode_depth"),
    ({"num_classes": 9}, "num_classes"),
    ({"input_size": 32}, "input_size"),
    ({"decoder_num_heads": 5}, "tensors"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(known, setting):
  error = expect_error(from_tensors, released(), **{**HEADS, **known})
  assert error.setting == setting


@pytest.mark.parametrize("network", ["DiT", "SiT", "TREAD", "MDT"])
def test_maskdit_is_no_other_network(network):
  error = expect_error(from_torch, PATH, network, **HEADS)
  assert (error.setting, error.value) == ("network", network)
  assert "must be MaskDiT" in error.accepted


def test_other_networks_are_no_maskdit():
  path = reference.FIXTURES / "dit.pt"
  error = expect_error(from_torch, path, "MaskDiT", num_heads=2)
  assert (error.setting, error.value) == ("network", "MaskDiT")
  error = expect_error(from_torch, path, **HEADS)
  assert (error.setting, error.value) == ("decoder_num_heads", 2)


@pytest.mark.parametrize(
  ("name", "change", "text"),
  [
    ("mask_token", None, "mask_token is missing"),
    ("pos_embed", None, "must hold a MaskDiT: pos_embed is missing"),
    ("cls_token", np.zeros((1, 1, 32), np.float32), "cls_token is unexpected"),
    ("decoder_blocks.1.mlp.fc1.bias", np.zeros(5, np.float32), "must have shape (96,)"),
    ("pos_embed", np.zeros((1, 10**6, 1), np.float32), "does not fit the other"),
  ],
)
def test_error_names_the_tensor_that_does_not_fit(name, change, text):
  tensors = {key: tensor for key, tensor in released().items() if key != name}
  if change is not None:
    tensors[name] = change
  error = expect_error(from_tensors, tensors, **HEADS)
  assert error.setting == "tensors" and text in error.accepted


def test_description_gives_the_sizes_of_the_decoder():
  text = describe_fully(from_torch(PATH, **HEADS)[0])
  assert "MaskDiT (depth x width x patch = 4x32x2), 2 heads, a decoder of 2" in text
  assert "blocks, width 24 and 2 heads" in text


# As the start of another network.


def tiny(name="MaskDiT-S/2", **attributes):
  return create_model(name, **{**TINY, **attributes})


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
  "attributes",
  [
    {"depth": 2},
    {"decode_depth": 2},
    {"decoder_hidden_size": 24},
    {"decoder_num_heads": 1},
  ],
)
def test_start_from_another_size_is_refused(attributes, partial):
  (name, value), *_ = attributes.items()
  error = expect_error(Adaptation, tiny(), tiny(**attributes), partial=partial)
  assert error.setting == "path"
  assert (
    error.accepted == f"does not fit: {name} is {TINY[name]} there and {value} here"
  )


@pytest.mark.parametrize("name", ["DiT-S/2", "MDT-S/2", "TREAD-S/2"])
def test_start_from_or_into_another_network_is_refused(name):
  sizes = {n: v for n, v in TINY.items() if not n.startswith("decode")}
  route = {"route_start": 0, "route_end": 0} if name == "TREAD-S/2" else {}
  other = create_model(name, **sizes, decode_depth=1, **route)
  for pair in ((tiny(), other), (other, tiny())):
    error = expect_error(Adaptation, *pair, partial=True)
    variants = " there and ".join(model.variant for model in pair)
    assert error.accepted == f"does not fit: the network is {variants} here"


def test_other_input_resizes_both_positions():
  adaptation = Adaptation(tiny(), tiny(input_size=(4, 8)))
  for name in ("pos_embed", "decode_pos_embed"):
    assert adaptation.starts[name].how == "resized"


def test_other_classes_need_no_row_for_the_null_label():
  adaptation = Adaptation(tiny(), tiny(num_classes=5), classes={4: 0})
  old = np.arange(24, dtype=np.float32).reshape(3, 8)
  new = -np.ones((5, 8), np.float32)
  path = "label_embed/table"
  table = adaptation.start(path, {path: old}.__getitem__, new)
  np.testing.assert_array_equal(table, [*new[:4], old[0]])
  assert "null" not in adaptation.starts[path].note
