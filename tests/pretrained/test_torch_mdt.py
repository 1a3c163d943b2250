"""Released checkpoints: round trips, inferred configs, and files that are refused."""

from __future__ import annotations

import argparse
import functools
import json
import pickle
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from mdt_jax import SettingError
from mdt_jax.conversion import torch_mdt as earlier
from mdt_jax.models.mdt import MDT
from mdt_jax.models.registry import abstract_params, create_model
from mdt_jax.pretrained import torch_mdt
from mdt_jax.pretrained.tensors import write_tensors
from mdt_jax.pretrained.torch_mdt import from_tensors, from_torch, to_torch
from mdt_jax.pretrained.torch_mdt_sizes import mlp_ratio
from tests import reference

TAKEN_FOR = {
  "mdt_v1": "read as MDT (depth x width x patch = 5x32x2)",
  "mdt_v2": "read as MDTv2 (depth x width x patch = 7x32x2)",
  "dit": "read as DiT (depth x width x patch = 3x32x2)",
}
# Unpublished sizes, and the smallest stacks from which a variant is inferred.
TINY = dict(input_size=4, num_classes=3, hidden_size=8, num_heads=2)
OTHER_CONFIGS = {
  "v1_decode_only": dict(variant="MDT", depth=2, decode_depth=2),
  "v2_decode_only": dict(variant="MDTv2", depth=2, decode_depth=2),
  "v2_one_pair": dict(variant="MDTv2", depth=3, decode_depth=1),
  "pixels": dict(variant="DiT", depth=1, in_channels=3, patch_size=1),
  "no_sigma": dict(variant="DiT", depth=1, learn_sigma=False),
  "narrow_mlp": dict(variant="MDT", depth=3, decode_depth=2, mlp_ratio=1.5),
}


@functools.cache
def released(name):
  tensors = torch.load(reference.FIXTURES / f"{name}.pt", weights_only=True)
  return {key: tensor.numpy() for key, tensor in tensors.items()}


@functools.cache
def recorded_config(name):
  return json.loads(str(reference.load(name)["config"]))


def write_pt(path, tensors):
  torch.save({name: torch.tensor(array) for name, array in tensors.items()}, path)


def write_safetensors(path, tensors):
  safetensors.numpy.save_file(tensors, path)


WRITERS = {".pt": write_pt, ".pth": write_pt, ".safetensors": write_safetensors}


def expect_error(*args, **kwargs):
  """Returns the message of the SettingError of `from_torch`."""
  with pytest.raises(SettingError) as error:
    from_torch(*args, **kwargs)
  return str(error.value)


def expect_tensor_error(name, tensors):
  with pytest.raises(SettingError) as error:
    from_tensors(tensors, source="there.pt", num_heads=2)
  return str(error.value)


# Round trips.


@functools.cache
def there_and_back(name):
  return to_torch(*reference.load_model(name))


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_round_trip_keeps_the_names(name):
  assert there_and_back(name).keys() == released(name).keys()


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_round_trip_keeps_the_shapes(name):
  shapes = {key: array.shape for key, array in there_and_back(name).items()}
  assert shapes == {key: array.shape for key, array in released(name).items()}


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_round_trip_keeps_the_types(name):
  types = {key: array.dtype for key, array in there_and_back(name).items()}
  assert types == {key: array.dtype for key, array in released(name).items()}


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_round_trip_keeps_every_bit_of_the_reference(name):
  back = there_and_back(name)
  for key, value in released(name).items():
    reference.assert_matches(
      f"{reference.NAMES[name]}, checkpoint converted there and back",
      back[key].view(np.uint8),
      value.view(np.uint8),
      0,
    )


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_written_file_is_read_back_bit_for_bit(name, suffix, tmp_path):
  """The arrays of to_torch must be in a form that can be written."""
  config, params = reference.load_model(name)
  path = tmp_path / f"model{suffix}"
  WRITERS[suffix](path, to_torch(config, params))
  _, again = from_torch(path, num_heads=config["num_heads"])
  jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_safetensors_round_trip_keeps_every_bit(name, tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(released(name), path)
  back = to_torch(*from_torch(path, num_heads=2))
  changed = [k for k, v in released(name).items() if v.tobytes() != back[k].tobytes()]
  assert not changed


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_parameters_are_float32_numpy_arrays(name):
  leaves = jax.tree.leaves(reference.load_model(name)[1])
  assert {(type(leaf), leaf.dtype.name) for leaf in leaves} == {(np.ndarray, "float32")}


@pytest.mark.parametrize("network", ["SiT", "TREAD"])
def test_round_trip_of_networks_like_dit_keeps_every_bit_of_the_reference(network):
  name = network.lower()
  path = reference.FIXTURES / f"{name}.pt"
  attributes, params = from_torch(path, network, num_heads=2)
  back = to_torch(attributes, params)
  assert attributes["variant"] == network and back.keys() == released(name).keys()
  for key, value in released(name).items():
    reference.assert_matches(
      f"{network}, checkpoint converted there and back",
      back[key].view(np.uint8),
      value.view(np.uint8),
      0,
    )


@pytest.mark.parametrize("network", [None, "MicroDiT"])
@pytest.mark.parametrize(
  ("name", "heads"), [("microdit_dit", 3), ("microdit_dit_same", 2)]
)
def test_round_trip_of_microdit_keeps_every_bit_of_the_reference(name, heads, network):
  path = reference.FIXTURES / f"{name}.pt"
  attributes, params = from_torch(path, network, num_heads=2, mixer_num_heads=heads)
  back = to_torch(attributes, params)
  assert attributes["variant"] == "MicroDiT" and back.keys() == released(name).keys()
  for key, value in released(name).items():
    reference.assert_matches(
      "MicroDiT, checkpoint converted there and back",
      back[key].view(np.uint8),
      value.view(np.uint8),
      0,
    )


@pytest.mark.parametrize("network", [None, "MicroDiT", "MicroDiTText"])
def test_round_trip_of_the_released_microdit_keeps_every_bit(network):
  """It has a buffer, mask_token, that is zero in a release and not in the recording."""
  path = reference.FIXTURES / "microdit.pt"
  attributes, params = from_torch(path, network, num_heads=4)
  back = to_torch(attributes, params)
  assert attributes["variant"] == "MicroDiTText"
  assert back.keys() == released("microdit").keys()
  for key, value in released("microdit").items():
    assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype)
    assert back[key].tobytes() == value.tobytes(), key


def test_sit_is_read_as_a_dit_unless_asked_for():
  attributes, _ = from_torch(reference.FIXTURES / "sit.pt", num_heads=2)
  assert (attributes["variant"], attributes["learn_sigma"]) == ("DiT", True)


def test_half_precision_is_read_as_float32(tmp_path):
  path = tmp_path / "half.pt"
  write_pt(path, {k: v.astype(np.float16) for k, v in released("dit").items()})
  _, params = from_torch(path, num_heads=2)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


# The inferred config.


@pytest.mark.parametrize(
  "size", ["input_size", "hidden_size", "depth", "num_heads", "num_classes"]
)
@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_recorded_sizes_are_inferred(name, size):
  assert reference.load_model(name)[0][size] == recorded_config(name)[size]


@pytest.mark.parametrize("name", reference.MDT_FIXTURES)
def test_recorded_decode_depth_is_inferred(name):
  inferred = reference.load_model(name)[0]["decode_depth"]
  assert inferred == recorded_config(name)["decode_layer"]


@pytest.mark.parametrize(
  ("name", "variant"), [("mdt_v1", "MDT"), ("mdt_v2", "MDTv2"), ("dit", "DiT")]
)
def test_variant_is_inferred(name, variant):
  assert reference.load_model(name)[0]["variant"] == variant


@functools.cache
def made_up(case):
  config = {**TINY, **OTHER_CONFIGS[case]}
  params = reference.random_params(MDT(**config))
  return config, params, to_torch(config, params)


@pytest.mark.parametrize("case", OTHER_CONFIGS)
def test_config_of_unpublished_sizes_is_inferred(case):
  config, _, tensors = made_up(case)
  inferred, _ = from_tensors(tensors, num_heads=2)
  assert {key: inferred[key] for key in config} == config


@pytest.mark.parametrize("case", OTHER_CONFIGS)
def test_parameters_of_unpublished_sizes_round_trip(case):
  _, params, tensors = made_up(case)
  _, again = from_tensors(tensors, num_heads=2)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def dit_tensors(hidden_size, num_heads):
  sizes = dict(hidden_size=hidden_size, num_heads=num_heads)
  config = dict(variant="DiT", input_size=4, depth=1, num_classes=3, **sizes)
  return to_torch(config, reference.random_params(MDT(**config)))


def test_dit_of_unpublished_width_needs_num_heads():
  path = reference.FIXTURES / "dit.pt"
  assert expect_error(path).startswith("num_heads = None: must be given")


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_dit_of_unpublished_width_accepts_num_heads(num_heads):
  config, _ = from_torch(reference.FIXTURES / "dit.pt", num_heads=num_heads)
  assert config["num_heads"] == num_heads


def test_dit_of_width_384_has_6_heads():
  config, _ = from_tensors(dit_tensors(hidden_size=384, num_heads=6))
  assert config["num_heads"] == 6


def test_num_heads_overrides_that_of_a_published_width():
  config, _ = from_tensors(dit_tensors(hidden_size=384, num_heads=6), num_heads=12)
  assert config["num_heads"] == 12


NETWORK_OF = {"mdt_v1": "MDT", "mdt_v2": "MDTv2", "dit": "DiT"}


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_network_argument_may_name_the_variant(name):
  path = reference.FIXTURES / f"{name}.pt"
  attributes, params = from_torch(path, NETWORK_OF[name], num_heads=2)
  assert attributes == reference.load_model(name)[0]
  jax.tree.map(np.testing.assert_array_equal, params, reference.load_model(name)[1])


@pytest.mark.parametrize(
  ("name", "network"),
  [
    ("mdt_v1", "DiT"),
    ("mdt_v1", "MDTv2"),
    ("mdt_v2", "MDT"),
    ("dit", "MDT"),
    ("mdt_v2", "SiT"),
    ("dit", "UNet"),
    ("dit", "dit"),
    ("dit", ""),
  ],
)
def test_network_that_the_file_does_not_hold_is_refused(name, network):
  with pytest.raises(SettingError) as caught:
    from_torch(reference.FIXTURES / f"{name}.pt", network, num_heads=2)
  assert (caught.value.setting, caught.value.value) == ("network", network)
  assert NETWORK_OF[name] in caught.value.accepted


@pytest.mark.parametrize("name", reference.MODEL_FIXTURES)
def test_create_model_accepts_the_inferred_attributes(name):
  attributes, params = reference.load_model(name)
  model = create_model(**attributes)
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(model))
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == shapes


def test_to_torch_refuses_invalid_attributes():
  attributes, params = reference.load_model("mdt_v1")
  with pytest.raises(SettingError) as caught:
    to_torch({**attributes, "decode_depth": 9}, params)
  assert caught.value.setting == "decode_depth"


def test_to_torch_refuses_a_bottleneck():
  attributes, params = reference.load_model("dit")
  with pytest.raises(SettingError) as caught:
    to_torch({**attributes, "patch_bottleneck": 4}, params)
  assert (caught.value.setting, caught.value.value) == ("patch_bottleneck", 4)


@pytest.mark.parametrize("name", ["from_tensors", "from_torch", "to_torch"])
def test_earlier_module_exports_the_same_functions(name):
  assert getattr(earlier, name) is getattr(torch_mdt, name)


@pytest.mark.parametrize("decode_depth", [1, 3, 4])
def test_v1_decode_depth_splits_the_blocks(decode_depth):
  path = reference.FIXTURES / "mdt_v1.pt"
  config, params = from_torch(path, decode_depth=decode_depth)
  kernels = [params[stack]["fc1"]["kernel"] for stack in ("blocks", "decode_blocks")]
  expected = [released("mdt_v1")[f"blocks.{i}.mlp.fc1.weight"].T for i in range(5)]
  assert config["decode_depth"] == len(kernels[1]) == decode_depth
  np.testing.assert_array_equal(np.concatenate(kernels), np.stack(expected))


@pytest.mark.parametrize("decode_depth", [1, 3, 4, 5])
def test_v1_decode_depth_does_not_change_released_tensors(decode_depth):
  path = reference.FIXTURES / "mdt_v1.pt"
  back = to_torch(*from_torch(path, decode_depth=decode_depth))
  assert back.keys() == released("mdt_v1").keys()
  jax.tree.map(np.testing.assert_array_equal, back, released("mdt_v1"))


@pytest.mark.parametrize(
  ("name", "overrides", "named"),
  [
    ("mdt_v1", dict(decode_depth=6), "decode_depth = 6"),
    ("mdt_v1", dict(decode_depth=0), "decode_depth = 0"),
    ("dit", dict(num_heads=3), "num_heads = 3"),
  ],
)
def test_error_names_an_override_that_does_not_fit(name, overrides, named):
  message = expect_error(reference.FIXTURES / f"{name}.pt", **overrides)
  assert TAKEN_FOR[name] in message and named in message


# Tensors that do not fit.


@pytest.mark.parametrize(
  ("name", "tensor"),
  [
    ("mdt_v1", "mask_token"),
    ("mdt_v1", "blocks.4.mlp.fc2.bias"),
    ("mdt_v1", "sideblocks.0.attn.rel_pos_bias.relative_position_index"),
    ("mdt_v2", "decoder_pos_embed"),
    ("mdt_v2", "de_blocks.2.skip_linear.weight"),
    ("mdt_v2", "en_outblocks.1.attn.rel_pos_bias.relative_position_bias_table"),
    ("dit", "t_embedder.mlp.2.bias"),
  ],
)
def test_error_names_a_missing_tensor(name, tensor):
  tensors = {key: value for key, value in released(name).items() if key != tensor}
  message = expect_tensor_error(name, tensors)
  assert message.endswith(f"{TAKEN_FOR[name]}: {tensor} is missing")


@pytest.mark.parametrize(
  ("name", "tensor"),
  [
    ("mdt_v1", "blocks.0.skip_linear.weight"),
    ("mdt_v2", "sideblocks.1.mlp.fc1.bias"),
    ("dit", "mask_token"),
  ],
)
def test_error_names_an_unexpected_tensor(name, tensor):
  tensors = {**released(name), tensor: np.zeros(3, np.float32)}
  message = expect_tensor_error(name, tensors)
  assert message.endswith(f"{TAKEN_FOR[name]}: {tensor} is unexpected")


@pytest.mark.parametrize(
  ("name", "tensor", "shape", "expected"),
  [
    ("mdt_v1", "mask_token", (32,), (1, 1, 32)),
    ("mdt_v1", "pos_embed", (1, 35, 32), (1, 36, 32)),
    ("mdt_v2", "de_blocks.1.mlp.fc2.weight", (128, 32), (32, 128)),
    (
      "mdt_v2",
      "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table",
      (121, 2),
      (124, 2),
    ),
    (
      "mdt_v2",
      "de_blocks.0.attn.rel_pos_bias.relative_position_index",
      (16, 16),
      (36, 36),
    ),
    ("dit", "x_embedder.proj.bias", (32, 1), (32,)),
  ],
)
def test_error_for_a_wrong_shape_gives_both_shapes(name, tensor, shape, expected):
  tensors = {**released(name), tensor: np.zeros(shape, np.float32)}
  message = expect_tensor_error(name, tensors)
  sentence = f"{tensor} must have shape {expected}, has {shape}"
  assert message.endswith(f"{TAKEN_FOR[name]}: {sentence}")


@pytest.mark.parametrize(
  ("count", "named", "rest"),
  [(1, 1, None), (5, 5, None), (6, 5, "; and 1 more"), (9, 5, "; and 4 more")],
)
def test_error_names_at_most_five_tensors(count, named, rest):
  extra = {f"stray.{i}": np.zeros(1, np.float32) for i in range(count)}
  message = expect_tensor_error("dit", {**released("dit"), **extra})
  assert len(re.findall(r"stray\.\d is unexpected", message)) == named
  assert message.endswith(rest or "is unexpected")


def test_one_error_lists_missing_unexpected_and_misshapen_tensors():
  tensors = {**released("dit"), "stray": np.zeros(1), "pos_embed": np.zeros((1, 36, 8))}
  del tensors["blocks.1.attn.proj.bias"]
  message = expect_tensor_error("dit", tensors)
  for part in (
    "proj.bias is missing",
    "stray is unexpected",
    "pos_embed must have shape",
  ):
    assert part in message


@pytest.mark.parametrize("suffix", WRITERS)
def test_error_names_the_file(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  WRITERS[suffix](path, {**released("mdt_v1"), "stray": np.zeros(1, np.float32)})
  assert f"path = {str(path)!r}: {TAKEN_FOR['mdt_v1']}" in expect_error(path)


@pytest.mark.parametrize(
  "tensor",
  ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"],
)
def test_file_without_a_required_tensor_is_not_a_model(tensor):
  tensors = {key: value for key, value in released("dit").items() if key != tensor}
  message = expect_tensor_error("dit", tensors)
  assert "must hold an MDT, MDTv2, DiT or SiT" in message and tensor in message


# Files that are not checkpoints.


def test_error_names_a_missing_file(tmp_path):
  path = tmp_path / "absent.pt"
  assert expect_error(path) == f"path = {str(path)!r}: must be a file"


def test_directory_is_refused(tmp_path):
  assert "must be a file" in expect_error(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".npz", ".ckpt", ".PT.txt"])
def test_wrong_suffix_is_refused(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes((reference.FIXTURES / "dit.pt").read_bytes())
  assert "must end in .pt, .pth, .bin or .safetensors" in expect_error(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
  ("suffix", "reason"),
  [
    (".pt", "must be a whole checkpoint that is safe to load: "),
    (".pth", "must be a whole checkpoint that is safe to load: "),
    (".safetensors", "must be a safetensors file: "),
  ],
)
def test_truncated_file_is_refused(suffix, reason, share, tmp_path):
  path = tmp_path / f"model{suffix}"
  WRITERS[suffix](path, released("dit"))
  whole = path.read_bytes()
  path.write_bytes(whole[: int(share * len(whole))])
  assert reason in expect_error(path)


@pytest.mark.parametrize("content", [b"hello\n", b"\x80\x04.", b"PK\x03\x04", b"{}"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_file_with_other_content_is_refused(suffix, content, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(content)
  assert f"path = {str(path)!r}: must be a " in expect_error(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_error_is_one_line(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(b"hello\nand\nmore")
  assert "\n" not in expect_error(path)


@pytest.mark.parametrize(
  "held", [[1.0], {"step": 3}, {"net": {"pos_embed": torch.zeros(1)}}, {"ema": {}}, 5]
)
def test_pt_file_without_tensors_is_refused(held, tmp_path):
  path = tmp_path / "other.pt"
  torch.save(held, path)
  assert "must hold a dict of named tensors" in expect_error(path)


def test_empty_state_dict_is_refused(tmp_path):
  path = tmp_path / "empty.pt"
  torch.save({}, path)
  assert "must hold an MDT, MDTv2, DiT or SiT" in expect_error(path)


# Pickles that hold code.


class Hostile:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return Path.touch, (Path(self.path),)


def as_pickle(held, path):
  path.write_bytes(pickle.dumps(held))


def as_legacy(held, path):
  torch.save(held, path, _use_new_zipfile_serialization=False)


def write_hostile(writer, mark, path):
  held = {key: torch.tensor(value) for key, value in released("dit").items()}
  writer({**held, "stray": Hostile(mark)}, path)


HOSTILE_WRITERS = [torch.save, as_legacy, as_pickle]


@pytest.mark.parametrize("writer", HOSTILE_WRITERS)
def test_pickle_with_code_is_refused(writer, tmp_path):
  path = tmp_path / "hostile.pt"
  write_hostile(writer, tmp_path / "mark", path)
  assert "safe to load" in expect_error(path, num_heads=2)


@pytest.mark.parametrize("writer", HOSTILE_WRITERS)
def test_code_in_a_pickle_does_not_run(writer, tmp_path):
  path, mark = tmp_path / "hostile.pt", tmp_path / "mark"
  write_hostile(writer, mark, path)
  with pytest.raises(SettingError):
    from_torch(path, num_heads=2)
  assert not mark.exists()


def test_code_in_a_pickle_runs_when_it_is_trusted(tmp_path):
  """Otherwise, the two tests above would prove nothing."""
  path, mark = tmp_path / "hostile.pt", tmp_path / "mark"
  write_hostile(torch.save, mark, path)
  torch.load(path, weights_only=False)
  assert mark.exists()


def test_parameters_are_copies_of_the_tensors():
  """A view would change with the arrays of the file."""
  config, params = reference.load_model("dit")
  tensors = to_torch(config, params)
  heads = config["num_heads"]
  _, loaded = from_tensors(tensors, num_heads=heads)
  assert not any(
    np.shares_memory(leaf, tensor)
    for leaf in jax.tree.leaves(loaded)
    for tensor in tensors.values()
  )


@pytest.mark.parametrize("share", [1.5, 2.3, 2.6875, 3.1])
@pytest.mark.parametrize("hidden_size", [8, 36, 44])
def test_mlp_ratio_gives_back_the_width(hidden_size, share):
  """A ratio that is not a binary fraction must not round to one unit less."""
  width = round(hidden_size * share)
  assert int(hidden_size * mlp_ratio(hidden_size, width)) == width


def test_position_index_in_another_order_is_refused():
  name = "sideblocks.0.attn.rel_pos_bias.relative_position_index"
  tensors = {**released("mdt_v1"), name: released("mdt_v1")[name].T}
  message = expect_tensor_error("mdt_v1", tensors)
  assert message.endswith(f"{name} must be the position index of the released code")


def test_ema_of_a_training_checkpoint_is_read(tmp_path):
  """The training code of DiT saves model, ema, opt and args in one file."""
  tensors = torch.load(reference.FIXTURES / "mdt_v1.pt", weights_only=True)
  held = {"ema": tensors, "model": {}, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
  torch.save(held, tmp_path / "training.pt")
  _, params = from_torch(tmp_path / "training.pt")
  jax.tree.map(np.testing.assert_array_equal, params, reference.load_model("mdt_v1")[1])


@pytest.mark.parametrize("name", ["mdt_v2", "dit"])
def test_decode_depth_is_refused_for_mdtv2_and_dit(name):
  path = reference.FIXTURES / f"{name}.pt"
  message = expect_error(path, num_heads=2, decode_depth=2)
  assert message.startswith("decode_depth = 2: ")


@pytest.mark.parametrize("suffix", WRITERS)
def test_failed_write_leaves_no_file(suffix, tmp_path):
  with pytest.raises((TypeError, ValueError, AttributeError)):
    write_tensors(tmp_path / f"model{suffix}", {"a": object()})
  assert not list(tmp_path.iterdir())


def test_bfloat16_checkpoint_is_read_as_float32(tmp_path):
  tensors = torch.load(reference.FIXTURES / "mdt_v1.pt", weights_only=True)
  halved = {
    name: tensor.bfloat16() if tensor.is_floating_point() else tensor
    for name, tensor in tensors.items()
  }
  torch.save(halved, tmp_path / "half.pt")
  _, params = from_torch(tmp_path / "half.pt")
  expected = tensors["mask_token"].bfloat16().float().numpy().ravel()
  np.testing.assert_array_equal(params["mask_token"], expected)
