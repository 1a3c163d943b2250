"""Other forms of released networks: wrappers, training checkpoints, diffusers."""

from __future__ import annotations

import argparse
import functools
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mdt_jax import SettingError
from mdt_jax.logs import counted
from mdt_jax.models.registry import create_model
from mdt_jax.pretrained.diffusers_folders import WEIGHT_FILES
from mdt_jax.pretrained.torch_mdt import from_tensors, from_torch
from tests import reference
from tests.pretrained import diffusers_reference
from tests.pretrained.test_torch_mdt import released

SAFETENSORS = WEIGHT_FILES[0]
CONFIG = {
  "_class_name": "DiTTransformer2DModel",
  "activation_fn": "gelu-approximate",
  "attention_bias": True,
  "attention_head_dim": 16,
  "in_channels": 4,
  "norm_elementwise_affine": False,
  "norm_type": "ada_norm_zero",
  "num_attention_heads": 2,
  "num_embeds_ada_norm": 10,
  "num_layers": 3,
  "out_channels": 8,
  "patch_size": 2,
  "sample_size": 12,
}


def assert_same(params, name="dit"):
  jax.tree.map(np.testing.assert_array_equal, params, reference.load_model(name)[1])


def as_torch(tensors):
  return {name: torch.tensor(array) for name, array in tensors.items()}


def prefixed(prefix, name="dit"):
  return {prefix + key: value for key, value in released(name).items()}


def expect_error(function, *args, **kwargs):
  with pytest.raises(SettingError) as caught:
    function(*args, **kwargs)
  assert "\n" not in str(caught.value)
  return caught.value


# Prefixes.


@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "_orig_mod.",
    "ema.",
    "model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module._orig_mod.",
    "ema._fsdp_wrapped_module.",
  ],
)
@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_prefixes_of_wrapped_networks_are_removed(prefix, name):
  assert_same(from_tensors(prefixed(prefix, name), num_heads=2)[1], name)


@pytest.mark.parametrize("part", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_wrappers_of_single_blocks_are_removed(part):
  tensors = {
    key.replace("blocks.1.", f"blocks.1.{part}."): value
    for key, value in released("dit").items()
  }
  assert_same(from_tensors(tensors, num_heads=2)[1])


def test_averages_are_preferred_to_the_trained_parameters():
  trained = {key: value + 1 for key, value in prefixed("model.").items()}
  tensors = {**trained, **prefixed("ema.module.")}
  assert_same(from_tensors(tensors, num_heads=2)[1])


def test_tensor_with_two_names_is_refused():
  tensors = {**released("dit"), "_orig_mod.pos_embed": released("dit")["pos_embed"]}
  error = expect_error(from_tensors, tensors, num_heads=2)
  assert "holds pos_embed twice" in error.accepted


def test_prefix_of_some_tensors_is_not_removed():
  tensors = {**prefixed("model."), "step": np.zeros(1, np.float32)}
  error = expect_error(from_tensors, tensors, num_heads=2)
  assert "x_embedder.proj.weight is missing" in error.accepted
  assert "model.pos_embed" in error.accepted


# Training checkpoints.


@pytest.mark.parametrize(
  "hold",
  [
    lambda tensors: {"model": tensors},
    lambda tensors: {"model": tensors, "ema": {}, "opt": {"lr": 1e-4}},
    lambda tensors: {"model": tensors, "ema": 0.9999, "epoch": 3},
    lambda tensors: {"state_dict": tensors, "epoch": 3, "callbacks": {}},
    lambda tensors: {"state_dict": {f"model.{k}": v for k, v in tensors.items()}},
    lambda tensors: {"module": tensors},
    lambda tensors: {"ema": {"model": tensors}},
    lambda tensors: {
      "ema": tensors,
      "model": {name: tensor + 1 for name, tensor in tensors.items()},
      "opt": {"state": {0: {"step": torch.tensor(3)}}},
      "args": argparse.Namespace(lr=1e-4, model="DiT-S/2"),
    },
  ],
)
def test_network_of_a_training_checkpoint_is_read(hold, tmp_path):
  torch.save(hold(as_torch(released("dit"))), tmp_path / "model.pt")
  assert_same(from_torch(tmp_path / "model.pt", num_heads=2)[1])


def test_error_names_entries_of_a_file_without_network(tmp_path):
  torch.save({"epoch": 3, "network": {"a": torch.ones(1)}}, tmp_path / "model.pt")
  error = expect_error(from_torch, tmp_path / "model.pt")
  for text in ("ema, model, state_dict", "2 entries: epoch, network"):
    assert text in error.accepted


@pytest.mark.parametrize(
  "tensors",
  [
    {"conv.weight": np.ones((3, 3), np.float32)},
    {"": np.ones(3, np.float32)},
    {"blocks.": np.ones(3, np.float32), "en_inblocks.": np.ones(3, np.float32)},
    {"transformer_blocks.0.": np.ones(3, np.float32)},
    {"x_embedder.proj.weight": np.ones((2, 0, 1, 1), np.float32)},
  ],
)
def test_error_names_tensors_of_another_network(tensors):
  error = expect_error(from_tensors, tensors)
  assert "must hold an MDT, MDTv2, DiT or SiT" in error.accepted
  assert f"it holds {counted(len(tensors), 'tensor')}, such as " in error.accepted


def test_integers_are_refused_as_parameters():
  name = "blocks.1.mlp.fc1.weight"
  tensors = {**released("dit"), name: np.ones((128, 32), np.int8)}
  error = expect_error(from_tensors, tensors, num_heads=2)
  assert f"{name} must hold floats, holds int8" in error.accepted


# Diffusers.


@functools.cache
def expected():
  """The fixture with the position embedding of the released code."""
  return diffusers_reference.with_sincos_positions(released("dit"))


@functools.cache
def in_diffusers_format():
  return diffusers_reference.to_diffusers(expected())


def write_diffusers(folder, tensors=None, config=None, name=SAFETENSORS):
  folder.mkdir(parents=True, exist_ok=True)
  tensors = in_diffusers_format() if tensors is None else tensors
  if name.endswith(".bin"):
    torch.save(as_torch(tensors), folder / name)
  else:
    save_file(dict(tensors), folder / name)
  if config is None:
    config = CONFIG
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def assert_is_fixture(result):
  attributes, params = result
  same, same_params = from_tensors(expected(), num_heads=2)
  assert attributes == same
  jax.tree.map(np.testing.assert_array_equal, params, same_params)


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("subfolder", ["", "transformer"])
def test_dit_of_diffusers_is_read_from_a_folder(name, subfolder, tmp_path):
  write_diffusers(tmp_path / subfolder, name=name)
  assert_is_fixture(from_torch(tmp_path))


def test_dit_of_diffusers_is_read_from_a_file_beside_its_config(tmp_path):
  assert_is_fixture(from_torch(write_diffusers(tmp_path) / SAFETENSORS))


def test_dit_of_diffusers_is_read_from_tensors():
  result = from_tensors(in_diffusers_format(), num_heads=2, input_size=12)
  assert_is_fixture(result)


def test_stored_position_embedding_of_diffusers_is_read():
  tensors = {**in_diffusers_format(), "pos_embed.pos_embed": expected()["pos_embed"]}
  assert_is_fixture(from_tensors(tensors, num_heads=2))


def test_forward_pass_equals_that_of_diffusers():
  attributes, params = from_tensors(in_diffusers_format(), num_heads=2, input_size=12)
  recorded = reference.load("dit")
  x, t, y = (recorded[key] for key in "xty")
  output = create_model(**attributes).apply(
    {"params": params}, reference.to_nhwc(x), t, y
  )
  theirs = diffusers_reference.forward(
    in_diffusers_format(), x, t, y, expected()["pos_embed"], num_heads=2
  )
  error = reference.relative_error(reference.to_nchw(output), theirs)
  assert error < reference.FORWARD_TOLERANCE


def test_dit_of_diffusers_without_config_needs_its_input_size(tmp_path):
  folder = write_diffusers(tmp_path)
  (folder / "config.json").unlink()
  error = expect_error(from_torch, folder / SAFETENSORS, num_heads=2)
  assert (error.setting, error.value) == ("input_size", None)
  assert "sample_size" in error.accepted


@pytest.mark.parametrize("size", [0, -2, 11, 10**12, 2**15])
def test_input_size_that_does_not_fit_is_refused(size):
  tensors = in_diffusers_format()
  error = expect_error(from_tensors, tensors, num_heads=2, input_size=size)
  assert (error.setting, error.value) == ("input_size", size)


def test_input_size_that_differs_from_the_tensors_is_refused():
  error = expect_error(from_tensors, released("dit"), num_heads=2, input_size=32)
  assert (error.setting, error.value) == ("input_size", 32)
  assert "must be 12" in error.accepted


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("part", ["linear_2.bias", "embedding_table.weight"])
def test_blocks_with_different_embeddings_are_refused(block, part):
  tensors = {
    name: value + 1 if f".{block}.norm1.emb" in name and name.endswith(part) else value
    for name, value in in_diffusers_format().items()
  }
  error = expect_error(from_tensors, tensors, num_heads=2, input_size=12)
  assert f"{part} differs from" in error.accepted


@pytest.mark.parametrize(
  ("name", "named"),
  [
    ("transformer_blocks.1.attn1.to_k.weight", "blocks.1.attn.qkv.weight is missing"),
    ("transformer_blocks.2.ff.net.2.bias", "blocks.2.mlp.fc2.bias is missing"),
    ("proj_out_1.bias", "final_layer.adaLN_modulation.1.bias is missing"),
  ],
)
def test_error_names_a_tensor_that_diffusers_lacks(name, named):
  tensors = {key: v for key, v in in_diffusers_format().items() if key != name}
  error = expect_error(from_tensors, tensors, num_heads=2, input_size=12)
  assert named in error.accepted


def test_queries_of_another_shape_are_refused():
  name = "transformer_blocks.1.attn1.to_q.weight"
  tensors = {**in_diffusers_format(), name: np.ones((16, 32), np.float32)}
  error = expect_error(from_tensors, tensors, num_heads=2, input_size=12)
  assert name in error.accepted and "equal shapes" in error.accepted


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("_class_name", "PixArtTransformer2DModel"),
    ("activation_fn", "geglu"),
    ("norm_type", "layer_norm"),
    ("attention_bias", False),
    ("norm_elementwise_affine", True),
    ("sample_size", "32"),
    ("sample_size", True),
    ("sample_size", [12, 12]),
    ("num_attention_heads", 0),
    ("num_embeds_ada_norm", None),
  ],
)
def test_error_names_an_unsupported_setting(setting, value, tmp_path):
  folder = write_diffusers(tmp_path, config={**CONFIG, setting: value})
  error = expect_error(from_torch, folder)
  assert error.setting == f"{setting} of {folder / 'config.json'}"
  assert error.value == value


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "null", "1" * 5000])
def test_invalid_config_is_refused(text, tmp_path):
  (write_diffusers(tmp_path) / "config.json").write_text(text)
  error = expect_error(from_torch, tmp_path)
  assert (error.setting, error.value) == ("path", str(tmp_path / "config.json"))


def test_folder_without_weights_is_refused(tmp_path):
  error = expect_error(from_torch, tmp_path)
  assert "must be a file, or a folder with model.safetensors" in error.accepted
