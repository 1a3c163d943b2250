"""What shapes do not show: the null label, heads, and whether a DiT is a SiT."""

from __future__ import annotations

import argparse
import json
import re

import jax
import numpy as np
import pytest
import torch

from mdt_jax import SettingError
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import create_model
from mdt_jax.pretrained.tensors import read_weight_file, write_tensors
from mdt_jax.pretrained.torch_mdt import (
  attributes_of,
  from_tensors,
  from_torch,
  read_checkpoint,
  to_torch,
)
from mdt_jax.pretrained.torch_mdt_sizes import (
  describe_fully,
  infer_attributes,
  notes,
  read_notes,
)
from tests import reference
from tests.cli.commands import assert_refused, run
from tests.pretrained.test_torch_mdt import released

TINY = dict(input_size=4, hidden_size=8, num_heads=2)
NETWORKS = {
  "DiT": dict(variant="DiT", depth=1),
  "SiT": dict(variant="SiT", depth=1, learn_sigma=False),
  "MDT": dict(variant="MDT", depth=3, decode_depth=1),
  "MDTv2": dict(variant="MDTv2", depth=3, decode_depth=1),
}
TABLE = "y_embedder.embedding_table.weight"


def network(variant, num_classes, label_dropout):
  config = dict(num_classes=num_classes, label_dropout=label_dropout)
  config = {**TINY, **NETWORKS[variant], **config}
  return config, reference.random_params(MDT(**config))


def with_rows(rows):
  return {**released("dit"), TABLE: np.ones((rows, 32), np.float32)}


def as_torch(tensors):
  return {name: torch.tensor(array) for name, array in tensors.items()}


def expect_error(function, *args, **kwargs):
  with pytest.raises(SettingError) as caught:
    function(*args, **kwargs)
  assert "\n" not in str(caught.value)
  return caught.value


# The row of the null label.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("variant", NETWORKS)
@pytest.mark.parametrize(
  ("num_classes", "dropout"), [(5, 0.0), (5, 0.1), (1000, 0.0), (999, 0.1)]
)
def test_own_file_round_trips_with_and_without_null_label(
  variant, num_classes, dropout, suffix, tmp_path
):
  """The file notes what its shapes do not show, such as the heads of a DiT."""
  config, params = network(variant, num_classes, dropout)
  tensors = to_torch(config, params)
  write_tensors(tmp_path / f"model{suffix}", tensors, notes(config))
  attributes, again = from_torch(tmp_path / f"model{suffix}")
  model = create_model(**attributes)
  assert {name: getattr(model, name) for name in config} == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
  back = to_torch(attributes, again)
  assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


@pytest.mark.parametrize("rows", [2, 11, 1000])
def test_num_classes_tells_whether_the_table_has_a_null_row(rows):
  with_null, _ = from_tensors(with_rows(rows), num_heads=2, num_classes=rows - 1)
  without, params = from_tensors(with_rows(rows), num_heads=2, num_classes=rows)
  assert with_null["num_classes"] == rows - 1 and "label_dropout" not in with_null
  assert (without["num_classes"], without["label_dropout"]) == (rows, 0.0)
  assert params["label_embed"]["table"].shape == (rows, 32)


@pytest.mark.parametrize("num_classes", [-1, 0, 9, 12, 10**9])
def test_num_classes_that_does_not_fit_the_table_is_refused(num_classes):
  error = expect_error(
    from_tensors, with_rows(11), num_heads=2, num_classes=num_classes
  )
  assert (error.setting, error.value) == ("num_classes", num_classes)
  assert "must be 10" in error.accepted and "or 11" in error.accepted


def test_command_names_the_flag_of_a_number_of_classes_that_does_not_fit(tmp_path):
  flags = (f"--input={reference.FIXTURES / 'dit.pt'}", f"--output={tmp_path / 'run'}")
  result = run("mdt_jax.convert", *flags, "--num_heads=2", "--num_classes=5")
  assert_refused(result, "--num_classes = 5: must be 10", "or 11")
  assert not (tmp_path / "run").exists()


def test_table_of_1000_rows_asks_for_num_classes():
  error = expect_error(from_tensors, with_rows(1000), num_heads=2)
  assert (error.setting, error.value) == ("num_classes", None)


def test_table_of_another_length_has_a_null_row():
  attributes = infer_attributes(with_rows(1001))
  assert attributes["num_classes"] == 1000 and "label_dropout" not in attributes


@pytest.mark.parametrize("rows", [1000, 1001])
def test_training_arguments_state_the_number_of_classes(rows, tmp_path):
  """DiT's training code saves its arguments as a Namespace."""
  args = argparse.Namespace(num_classes=1000, model="DiT-XL/2")
  torch.save({"ema": as_torch(with_rows(rows)), "args": args}, tmp_path / "model.pt")
  attributes, _ = from_torch(tmp_path / "model.pt", num_heads=2)
  assert attributes["num_classes"] == 1000
  assert attributes.get("label_dropout") == (0.0 if rows == 1000 else None)


@pytest.mark.parametrize("stated", [7, -1, "10", None, True, 10.0, [10]])
def test_stated_number_of_classes_that_does_not_fit_is_ignored(stated):
  metadata = {"num_classes": stated}
  attributes, _ = from_tensors(released("dit"), num_heads=2, metadata=metadata)
  assert attributes == reference.load_model("dit")[0]


@pytest.mark.parametrize(
  "text", ["", "{", "[]", "null", '{"num_heads": [2]}', "[" * 9999]
)
def test_broken_notes_are_ignored(text):
  error = expect_error(from_tensors, released("dit"), metadata={"mdt_jax": text})
  assert (error.setting, error.value) == ("num_heads", None)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_notes_are_read_back(suffix, tmp_path):
  noted = notes({"num_heads": 2, "hidden_size": 32}, diffusion={"prediction": "v"})
  write_tensors(tmp_path / f"a{suffix}", {"x": np.ones(2, np.float32)}, noted)
  found = read_weight_file(tmp_path / f"a{suffix}")
  assert read_notes(found.metadata) == {
    "num_heads": 2,
    "diffusion": {"prediction": "v"},
  }


def test_pytorch_loads_a_state_dict_with_notes(tmp_path):
  """The released code passes the file to load_state_dict, which checks all names."""
  path = tmp_path / "model.pt"
  layer = torch.nn.Linear(3, 2)
  tensors = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(2, np.float32)}
  write_tensors(path, tensors, notes({"num_heads": 2}))
  layer.load_state_dict(torch.load(path, weights_only=True), strict=True)
  assert layer.weight.detach().numpy().tolist() == tensors["weight"].tolist()


# SiT and TREAD, whose tensors look like those of a DiT.


STATED = [
  dict(model="SiT-XL/2"),
  dict(model="SiT_B"),
  dict(path_type="Linear", prediction="velocity", model="XL/2"),
]


def write_training_checkpoint(path, args, name="dit"):
  held = {"ema": as_torch(released(name)), "args": argparse.Namespace(**args)}
  torch.save(held, path)


@pytest.mark.parametrize("args", STATED)
@pytest.mark.parametrize("asked", [None, "SiT"])
def test_file_whose_arguments_name_a_sit_is_read_as_one(args, asked, tmp_path):
  write_training_checkpoint(tmp_path / "model.pt", args)
  attributes, _ = from_torch(tmp_path / "model.pt", asked, num_heads=2)
  assert (attributes["variant"], attributes["learn_sigma"]) == ("SiT", False)


@pytest.mark.parametrize("args", STATED)
def test_file_whose_arguments_name_a_sit_is_no_dit(args, tmp_path):
  write_training_checkpoint(tmp_path / "model.pt", args)
  error = expect_error(from_torch, tmp_path / "model.pt", "DiT", num_heads=2)
  assert (error.setting, error.value) == ("network", "DiT")
  assert "must be SiT" in error.accepted


@pytest.mark.parametrize("asked", [None, "TREAD"])
def test_file_whose_arguments_name_a_tread_is_read_as_one(asked, tmp_path):
  write_training_checkpoint(tmp_path / "model.pt", dict(model="TREAD-XL/2"), "tread")
  attributes, _ = from_torch(tmp_path / "model.pt", asked, num_heads=2)
  assert attributes["variant"] == "TREAD"


@pytest.mark.parametrize("asked", ["DiT", "SiT"])
def test_file_whose_arguments_name_a_tread_is_no_other_network(asked, tmp_path):
  write_training_checkpoint(tmp_path / "model.pt", dict(model="TREAD-XL/2"), "tread")
  error = expect_error(from_torch, tmp_path / "model.pt", asked, num_heads=2)
  assert (error.setting, error.value) == ("network", asked)
  assert "must be TREAD" in error.accepted


def test_metadata_of_safetensors_names_a_sit(tmp_path):
  path = tmp_path / "model.safetensors"
  write_tensors(path, released("dit"), {"model": "sit-b/2"})
  assert from_torch(path, num_heads=2)[0]["variant"] == "SiT"


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "my_sit_b_2.pt", "sit-s.pt"])
def test_file_named_like_a_sit_needs_its_network(name, tmp_path):
  torch.save(as_torch(released("dit")), tmp_path / name)
  error = expect_error(from_torch, tmp_path / name, num_heads=2)
  assert error.setting == "path"
  assert "network=DiT" in error.accepted and "network=SiT" in error.accepted
  attributes, _ = from_torch(tmp_path / name, "DiT", num_heads=2)
  assert attributes == reference.load_model("dit")[0]
  attributes, _ = from_torch(tmp_path / name, "SiT", num_heads=2)
  expected = {**reference.load_model("dit")[0], "variant": "SiT", "learn_sigma": False}
  assert attributes == expected


def test_variance_that_was_never_trained_marks_a_sit():
  """The output starts at zero, and the loss of a flow model ignores the variance."""
  name = "final_layer.linear.weight"
  weight = released("dit")[name].reshape(4, 8, 32).copy()
  weight[:, 4:] = 0
  tensors = {**released("dit"), name: weight.reshape(32, 32)}
  error = expect_error(from_tensors, tensors, num_heads=2)
  assert "variance are zero" in error.accepted and "network=DiT" in error.accepted
  assert from_tensors(tensors, network="DiT", num_heads=2)[0]["learn_sigma"]
  assert from_tensors(tensors, network="SiT", num_heads=2)[0]["variant"] == "SiT"


def test_untrained_dit_is_no_sit():
  name = "final_layer.linear.weight"
  tensors = {**released("dit"), name: np.zeros((32, 32), np.float32)}
  assert from_tensors(tensors, num_heads=2)[0]["variant"] == "DiT"


@pytest.mark.parametrize(
  ("network", "process", "variant"),
  [(None, "flow", "SiT"), (None, "gaussian", "DiT"), ("DiT", "flow", "DiT")],
)
def test_process_tells_a_sit_from_a_dit(network, process, variant, tmp_path):
  torch.save(as_torch(released("dit")), tmp_path / "SiT-XL-2-256x256.pt")
  found = read_checkpoint(
    tmp_path / "SiT-XL-2-256x256.pt", network, num_heads=2, process=process
  )
  assert found.attributes["variant"] == variant


@pytest.mark.parametrize("process", [None, "flow"])
def test_own_dit_is_no_sit_whatever_its_process(process):
  metadata = notes({"variant": "DiT", "num_heads": 2})
  found, _ = from_tensors(released("dit"), metadata=metadata, process=process)
  assert found["variant"] == "DiT"


def test_last_layer_of_a_sit_has_twice_the_channels():
  config = dict(TINY, variant="DiT", depth=1, learn_sigma=False)
  params = reference.random_params(MDT(**config))
  error = expect_error(from_tensors, to_torch(config, params), network="SiT")
  assert (error.setting, error.value) == ("network", "SiT")
  assert "has 4 channels" in error.accepted


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "transit-b.pt", "site.pt"])
def test_other_names_are_not_taken_for_a_sit(name, tmp_path):
  torch.save(as_torch(released("dit")), tmp_path / name)
  assert from_torch(tmp_path / name, num_heads=2)[0]["variant"] == "DiT"


def test_tread_is_read_as_a_dit_unless_it_is_asked_for():
  """Both have the same tensors; only the caller or the file can tell them apart."""
  path = reference.FIXTURES / "tread.pt"
  dit, params = from_torch(path, num_heads=2)
  tread, again = from_torch(path, "TREAD", num_heads=2)
  assert (dit["variant"], dit["learn_sigma"]) == ("DiT", False)
  assert tread == {**dit, "variant": "TREAD"}
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", ["mdt_v1", "mdt_v2"])
def test_mdt_is_no_tread(name):
  error = expect_error(from_tensors, released(name), network="TREAD")
  assert (error.setting, error.value) == ("network", "TREAD")


@pytest.mark.parametrize("route", [{}, {"route_start": 0, "route_end": 4}])
def test_route_of_an_own_file_survives_a_round_trip(route, tmp_path):
  attributes, params = from_torch(reference.FIXTURES / "tread.pt", "TREAD", num_heads=2)
  model = create_model(**attributes, **route)
  own = attributes_of(model)
  path = tmp_path / "model.safetensors"
  write_tensors(path, to_torch(own, params), notes(own))
  assert create_model(**from_torch(path)[0]) == model


@pytest.mark.parametrize("end", [1, 7, 10**9])
def test_route_that_does_not_fit_the_blocks_is_refused(end):
  attributes, params = from_torch(reference.FIXTURES / "tread.pt", "TREAD", num_heads=2)
  metadata = notes({**attributes, "route_end": end})
  error = expect_error(from_tensors, to_torch(attributes, params), metadata=metadata)
  assert error.setting == "tensors" and f"route_end = {end}" in error.accepted


# MicroDiT, whose mixer has heads of its own.


MICRODIT = reference.FIXTURES / "microdit_dit.pt"


def test_heads_of_a_mixer_are_asked_for():
  """Heads of 32 / 2 numbers, as in the other blocks, do not divide 24."""
  error = expect_error(from_torch, MICRODIT, num_heads=2)
  assert (error.setting, error.value) == ("mixer_num_heads", None)
  assert "must be given" in error.accepted and "16" in error.accepted


def test_heads_of_a_mixer_are_as_large_as_the_others_by_default():
  path = reference.FIXTURES / "microdit_dit_same.pt"
  attributes, params = from_torch(path, num_heads=4)
  assert create_model(**attributes).mixer_heads == 4
  assert params["mixer_blocks"]["attention"]["qkv"]["kernel"].shape == (2, 32, 3, 4, 8)


def test_heads_of_a_mixer_that_do_not_fit_are_refused():
  error = expect_error(from_torch, MICRODIT, num_heads=2, mixer_num_heads=5)
  assert error.setting == "path" and "mixer_num_heads = 5" in error.accepted


def test_heads_of_a_mixer_are_refused_for_another_network():
  error = expect_error(from_tensors, released("dit"), num_heads=2, mixer_num_heads=2)
  assert (error.setting, error.value) == ("mixer_num_heads", 2)
  assert "holds DiT, not MicroDiT" in error.accepted


@pytest.mark.parametrize("network", ["DiT", "TREAD"])
def test_microdit_is_no_other_network(network):
  error = expect_error(from_torch, MICRODIT, network, num_heads=2, mixer_num_heads=3)
  assert (error.setting, error.value) == ("network", network)
  assert "must be MicroDiT" in error.accepted


def test_dit_is_no_microdit():
  error = expect_error(from_tensors, released("dit"), network="MicroDiT", num_heads=2)
  assert (error.setting, error.value) == ("network", "MicroDiT")


@pytest.mark.parametrize(
  "name", ["patch_mixer.1.mlp.fc1.bias", "patch_mixer_map_xout.0.weight"]
)
def test_error_names_a_missing_tensor_of_a_mixer(name):
  tensors = {key: v for key, v in released("microdit_dit").items() if key != name}
  error = expect_error(from_tensors, tensors, num_heads=2, mixer_num_heads=3)
  assert error.accepted.endswith(
    f"read as MicroDiT (depth x width x patch = 4x32x2): {name} is missing"
  )


@pytest.mark.parametrize("shape", [(72,), (72, 0)])
def test_mixer_of_another_shape_is_refused(shape):
  name = "patch_mixer.0.attn.qkv.weight"
  tensors = {**released("microdit_dit"), name: np.zeros(shape, np.float32)}
  error = expect_error(from_tensors, tensors, num_heads=2)
  assert f"{name} has shape {shape}" in error.accepted


# The released MicroDiT, which reads captions.


def test_heads_of_the_released_microdit_are_asked_for():
  error = expect_error(from_tensors, released("microdit"))
  assert (error.setting, error.value) == ("num_heads", None)


def test_network_with_captions_has_no_classes():
  error = expect_error(from_tensors, released("microdit"), num_heads=4, num_classes=3)
  assert (error.setting, error.value) == ("num_classes", 3)


@pytest.mark.parametrize(
  "name", ["blocks.3.mlp.w2", "y_embedder.y_proj.fc1.weight", "blocks.0.norm2.weight"]
)
def test_error_names_a_missing_tensor_of_the_released_microdit(name):
  tensors = {key: v for key, v in released("microdit").items() if key != name}
  error = expect_error(from_tensors, tensors, num_heads=4)
  assert "MicroDiTText" in error.accepted and f"{name} is missing" in error.accepted


# The description for the log.


@pytest.mark.parametrize(
  ("name", "texts"),
  [
    ("mdt_v1", ("MDT (", "5x32x2", "2 heads, 2 decode blocks", "12 x 12 x 4")),
    ("mdt_v2", ("MDTv2 (", "7x32x2", "decode blocks", "and a null label")),
    ("dit", ("DiT (", "3x32x2", "10 classes and a null label", "learned variance")),
  ],
)
def test_description_names_network_sizes_classes_and_variance(name, texts):
  text = describe_fully(reference.load_model(name)[0])
  assert all(part in text for part in texts), text


def test_description_of_a_network_without_null_label_and_learned_variance():
  attributes = {**reference.load_model("dit")[0], "label_dropout": 0.0}
  text = describe_fully({**attributes, "learn_sigma": False})
  assert re.search("classes without a null label; no learned variance", text)


def test_description_of_a_mixer():
  attributes, _ = from_torch(MICRODIT, num_heads=2, mixer_num_heads=3)
  text = describe_fully(attributes)
  assert "2 heads, 2 mixer blocks of width 24 and 3 heads" in text
  text = describe_fully({**attributes, "mixer_num_heads": None})
  assert "of width 24 and heads of the same size" in text


def test_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  torch.save(as_torch(released("dit")), tmp_path / "model.pt")
  assert from_torch("~/model.pt", num_heads=2)[0]["variant"] == "DiT"


def test_notes_are_json():
  assert json.loads(notes({"variant": "DiT", "depth": 3})["mdt_jax"]) == {
    "variant": "DiT"
  }
