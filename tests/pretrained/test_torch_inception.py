"""Inception weights: every file format, and files that are refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mdt_jax.errors import SettingError
from mdt_jax.pretrained import torch_inception
from mdt_jax.pretrained.torch_inception import convert_inception, load_inception
from tests import reference


def tensors():
  return reference.inception_tensors()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """A converted PyTorch state dict that includes num_batches_tracked."""
  folder = tmp_path_factory.mktemp("inception")
  state = {name: torch.from_numpy(array) for name, array in tensors().items()}
  state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
  torch.save(state, folder / "weights.pth")
  convert_inception(folder / "weights.pth", folder / "inception.safetensors")
  return folder / "inception.safetensors"


def assert_same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_names_and_shapes_match_pytorch_fid():
  recorded = json.loads((reference.FIXTURES / "inception_params.json").read_text())
  expected = {name: tuple(shape) for name, shape in recorded.items()}
  assert torch_inception.tensor_shapes() == expected


def test_converted_file_holds_the_same_tensors(converted):
  assert_same(load_file(converted), dict(tensors()))


def test_parameters_of_the_converted_file_match_the_tensors(converted):
  assert_same(load_inception(converted), torch_inception.to_params(tensors()))


def test_frozen_tensorflow_graph_gives_the_same_tensors(tmp_path, converted):
  tf = pytest.importorskip("tensorflow")

  graph = tf.compat.v1.GraphDef()
  for theirs, ours in torch_inception.graph_names().items():
    array = tensors()[ours]
    if array.ndim == 4:
      array = array.transpose(2, 3, 1, 0)
    node = graph.node.add(name=theirs, op="Const")
    node.attr["value"].tensor.CopyFrom(
      tf.make_tensor_proto(array.T if array.ndim == 2 else array)
    )
  graph.node.add(name="ExpandDims", op="ExpandDims")
  (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
  convert_inception(tmp_path / "graph.pb", tmp_path / "inception.safetensors")
  assert_same(load_file(tmp_path / "inception.safetensors"), load_file(converted))


@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ("conv_4/conv2d_params", "Conv2d_4a_3x3.conv.weight"),
    ("mixed/tower/conv_1/conv2d_params", "Mixed_5b.branch5x5_2.conv.weight"),
    ("mixed_3/tower/conv_2/batchnorm/beta", "Mixed_6a.branch3x3dbl_3.bn.bias"),
    ("mixed_6/conv/conv2d_params", "Mixed_6d.branch1x1.conv.weight"),
    (
      "mixed_8/tower_1/conv_3/batchnorm/moving_mean",
      "Mixed_7a.branch7x7x3_4.bn.running_mean",
    ),
    (
      "mixed_10/tower_1/mixed/conv_1/batchnorm/gamma",
      "Mixed_7c.branch3x3dbl_3b.bn.weight",
    ),
    ("softmax/weights", "fc.weight"),
  ],
)
def test_graph_constants_map_to_the_known_layers(theirs, ours):
  assert torch_inception.graph_names()[theirs] == ours


def test_every_tensor_has_one_graph_constant():
  names = list(torch_inception.graph_names().values())
  assert sorted(names) == sorted(tensors())


REFUSED = {
  "another number of classes": (
    {"fc.weight": np.zeros((1000, 2048), np.float32)},
    r"fc\.weight must have shape \(1008, 2048\), has \(1000, 2048\)",
  ),
  "an auxiliary head": (
    {"AuxLogits.fc.bias": np.zeros(1000, np.float32)},
    r"AuxLogits\.fc\.bias is unexpected",
  ),
  "a number that is none": (
    {"fc.bias": np.full(1008, np.nan, np.float32)},
    r"fc\.bias must be finite",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, case):
  changes, message = REFUSED[case]
  monkeypatch.setattr(
    torch_inception, "read_tensors", lambda path: {**tensors(), **changes}
  )
  with pytest.raises(SettingError, match=f"Inception v3.*{message}"):
    convert_inception("weights.pth", tmp_path / "out.safetensors")
  assert not list(tmp_path.iterdir())


def test_error_names_missing_tensors(tmp_path):
  save_file({"fc.bias": tensors()["fc.bias"]}, tmp_path / "part.safetensors")
  with pytest.raises(SettingError, match=r"is missing; .*and 466 more"):
    load_inception(tmp_path / "part.safetensors")


def test_file_with_code_is_refused(tmp_path):
  class Harmful:
    def __reduce__(self):
      return (print, ("run",))

  torch.save({"fc.bias": Harmful()}, tmp_path / "weights.pth")
  with pytest.raises(SettingError, match="safe to load"):
    load_inception(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["graph.pb", "weights.pth", "weights.safetensors"])
def test_error_names_a_file_with_other_content(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"\xff something else \xff")
  with pytest.raises(SettingError, match=rf"^path = .*{name}"):
    load_inception(path)


@pytest.mark.parametrize(
  ("dtype", "sides", "values"),
  [
    ("float32", [2**20, 2**20], dict(float_val=[1.0])),  # repeated: 4 TiB
    ("float32", [-1], dict(float_val=[1.0])),
    ("float32", [3], dict(tensor_content=b"12345")),
    ("string", [1], dict(string_val=[b"text"])),
    ("complex64", [1], dict(scomplex_val=[1.0, 2.0])),
    ("resource", [1], {}),
  ],
)
def test_graph_with_a_hostile_constant_is_refused(tmp_path, dtype, sides, values):
  tf = pytest.importorskip("tensorflow")

  graph = tf.compat.v1.GraphDef()
  tensor = graph.node.add(name="softmax/biases", op="Const").attr["value"].tensor
  tensor.dtype = getattr(tf, dtype).as_datatype_enum
  for side in sides:
    tensor.tensor_shape.dim.add(size=side)
  tensor.MergeFrom(type(tensor)(**values))
  (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
  with pytest.raises(SettingError, match=r"^path = .*graph\.pb.*softmax/biases"):
    load_inception(tmp_path / "graph.pb")


@pytest.mark.parametrize("name", ["graph.pb", "weights.pth"])
def test_error_names_a_missing_file(tmp_path, name):
  with pytest.raises(SettingError, match=rf"^path = .*{name}.* must be a file"):
    load_inception(tmp_path / name)


def test_error_uses_the_setting_name_of_the_caller(tmp_path):
  with pytest.raises(SettingError) as caught:
    load_inception(tmp_path / "gone.pth", "config.eval.inception")
  assert caught.value.setting == "config.eval.inception"


def test_missing_source_is_an_error_of_source(tmp_path):
  with pytest.raises(SettingError) as caught:
    convert_inception(tmp_path / "gone.pth", tmp_path / "out.safetensors")
  assert caught.value.setting == "source"


def test_target_must_be_a_safetensors_file(tmp_path):
  with pytest.raises(SettingError, match=r"^target = .*must end in \.safetensors"):
    convert_inception(tmp_path / "a.pth", tmp_path / "b.pth")


def test_existing_target_is_refused(converted):
  with pytest.raises(SettingError, match=r"^target = .*exists already"):
    convert_inception(converted, converted)


def test_error_for_another_suffix_lists_the_readable_ones(tmp_path):
  (tmp_path / "inception.txt").write_text("weights")
  with pytest.raises(SettingError, match=r"\.bin, \.safetensors or \.pb$"):
    load_inception(tmp_path / "inception.txt")
