"""create_model: presets, attributes, and the parameters stored in checkpoints."""

from __future__ import annotations

import functools

import flax
import jax
import numpy as np
import pytest

from mdt_jax import MODELS, SettingError, create_model
from mdt_jax.models.registry import NETWORKS, abstract_params, init_params, network_of

SMALL = dict(
  input_size=8, in_channels=4, num_classes=10, hidden_size=16, num_heads=2, patch_size=2
)


def small(variant):
  depths = dict(DiT=(2, 2), SiT=(2, 2), MDT=(3, 2), MDTv2=(4, 2), TREAD=(6, 2))
  depths |= dict(MicroDiT=(2, 2))
  depths["SPRINT"] = (5, 2)
  depths["MaskDiT"] = (2, 1)
  depth, decode_depth = depths[variant]
  decoder = dict(decoder_hidden_size=8, decoder_num_heads=1)
  return create_model(
    variant=variant,
    depth=depth,
    decode_depth=decode_depth,
    **SMALL,
    **(decoder if variant == "MaskDiT" else {}),
  )


def test_each_network_has_16_presets():
  """But for the released network of MicroDiT, which has two."""
  assert len(MODELS) == (len(NETWORKS) - 1) * 4 * 4 + 2


@pytest.mark.parametrize("name", MODELS)
def test_preset_creates_its_network_and_attributes(name):
  model = create_model(name)
  assert name in network_of(model).presets
  assert {key: getattr(model, key) for key in MODELS[name]} == MODELS[name]


@pytest.mark.parametrize("variant", sorted({*NETWORKS} - {"MicroDiTText"}))
def test_create_model_accepts_attributes_without_a_name(variant):
  attributes = dict(SMALL, variant=variant, depth=6, decode_depth=2, mlp_ratio=3.0)
  network = NETWORKS[variant]
  expected = network.module(**{**network.defaults, **attributes})
  assert create_model(**attributes) == expected


@pytest.mark.parametrize("key", ["name", "variant"])
@pytest.mark.parametrize("variant", ["SiT", "TREAD", "MaskDiT", "MicroDiT", "SPRINT"])
def test_networks_of_continuous_processes_have_no_learned_variance(variant, key):
  model = create_model(**{key: f"{variant}-S/2" if key == "name" else variant})
  assert (model.learn_sigma, model.out_channels) == (False, 4)


def test_dtype_may_be_a_string():
  assert create_model("DiT-S/2", dtype="bfloat16").dtype == jax.numpy.bfloat16


def test_attribute_none_keeps_the_value_of_the_preset():
  assert create_model("MDT-L/4", depth=None, patch_size=None).depth == 24


def test_unknown_name_is_refused():
  with pytest.raises(SettingError, match="name = 'MDT-M/2': must be NETWORK-SIZE"):
    create_model("MDT-M/2")


def test_missing_name_and_variant_are_refused():
  with pytest.raises(SettingError) as error:
    create_model(depth=3)
  assert (error.value.setting, error.value.value) == ("name", None)


def test_unknown_variant_is_refused():
  with pytest.raises(SettingError) as error:
    create_model(variant="MDTv3", depth=3)
  assert (error.value.setting, error.value.value) == ("variant", "MDTv3")


def test_unknown_attribute_is_refused():
  with pytest.raises(SettingError, match="MDT") as error:
    create_model("MDT-S/2", width=3)
  assert (error.value.setting, error.value.value) == ("width", 3)


# The parameter tree of all checkpoints so far. If these tables change, old checkpoints
# no longer load.

BLOCK = {
  "attention/proj/bias": (16,),
  "attention/proj/kernel": (2, 8, 16),
  "attention/qkv/bias": (3, 2, 8),
  "attention/qkv/kernel": (16, 3, 2, 8),
  "fc1/bias": (64,),
  "fc1/kernel": (16, 64),
  "fc2/bias": (16,),
  "fc2/kernel": (64, 16),
  "modulation/linear/bias": (96,),
  "modulation/linear/kernel": (16, 96),
}
ROTARY_BLOCK = BLOCK | {"attention/q_norm": (8,), "attention/k_norm": (8,)}
BIASED_BLOCK = BLOCK | {"attention/relative_position_bias": (52, 2)}
SKIP_BLOCK = BIASED_BLOCK | {"skip/bias": (16,), "skip/kernel": (32, 16)}
SHARED = {
  "final_layer/linear/bias": (32,),
  "final_layer/linear/kernel": (16, 32),
  "final_layer/modulation/linear/bias": (32,),
  "final_layer/modulation/linear/kernel": (16, 32),
  "label_embed/table": (11, 16),
  "patch_embed/linear/bias": (16,),
  "patch_embed/linear/kernel": (16, 16),
  "pos_embed": (16, 16),
  "timestep_embed/fc1/bias": (16,),
  "timestep_embed/fc1/kernel": (256, 16),
  "timestep_embed/fc2/bias": (16,),
  "timestep_embed/fc2/kernel": (16, 16),
}
MASKED = (
  SHARED
  | {"decode_pos_embed": (16, 16), "mask_token": (16,)}
  | {f"side_block/{path}": shape for path, shape in BIASED_BLOCK.items()}
)


def stacked(name, length, block):
  return {f"{name}/{path}": (length, *shape) for path, shape in block.items()}


TREES = {
  "DiT": SHARED | stacked("blocks", 2, BLOCK),
  "SiT": SHARED | stacked("blocks", 2, BLOCK),
  "TREAD": SHARED
  | stacked("blocks", 6, BLOCK)
  | {"final_layer/linear/bias": (16,), "final_layer/linear/kernel": (16, 16)},
  "MicroDiT": SHARED
  | stacked("mixer_blocks", 3, BLOCK)
  | stacked("blocks", 2, BLOCK)
  | {"final_layer/linear/bias": (16,), "final_layer/linear/kernel": (16, 16)},
  "SPRINT": {path: shape for path, shape in SHARED.items() if path != "pos_embed"}
  | {"mask_token": (16,), "fuse/bias": (16,), "fuse/kernel": (32, 16)}
  | stacked("encoder_blocks", 2, ROTARY_BLOCK)
  | stacked("middle_blocks", 1, ROTARY_BLOCK)
  | stacked("decode_blocks", 2, ROTARY_BLOCK)
  | {"final_layer/linear/bias": (16,), "final_layer/linear/kernel": (16, 16)},
  "MaskDiT": SHARED
  | stacked("blocks", 2, BLOCK)
  | {
    "decode_blocks/attention/proj/bias": (1, 8),
    "decode_blocks/attention/proj/kernel": (1, 1, 8, 8),
    "decode_blocks/attention/qkv/bias": (1, 3, 1, 8),
    "decode_blocks/attention/qkv/kernel": (1, 8, 3, 1, 8),
    "decode_blocks/fc1/bias": (1, 32),
    "decode_blocks/fc1/kernel": (1, 8, 32),
    "decode_blocks/fc2/bias": (1, 8),
    "decode_blocks/fc2/kernel": (1, 32, 8),
    "decode_blocks/modulation/linear/bias": (1, 48),
    "decode_blocks/modulation/linear/kernel": (1, 16, 48),
    "decode_pos_embed": (16, 8),
    "decoder_layer/linear/bias": (8,),
    "decoder_layer/linear/kernel": (16, 8),
    "decoder_layer/modulation/linear/bias": (32,),
    "decoder_layer/modulation/linear/kernel": (16, 32),
    "final_layer/linear/bias": (16,),
    "final_layer/linear/kernel": (8, 16),
    "final_layer/modulation/linear/bias": (16,),
    "final_layer/modulation/linear/kernel": (16, 16),
    "label_embed/table": (10, 16),
    "mask_token": (8,),
  },
  "MDT": MASKED
  | stacked("blocks", 1, BIASED_BLOCK)
  | stacked("decode_blocks", 2, BIASED_BLOCK),
  "MDTv2": MASKED
  | stacked("in_blocks", 1, BIASED_BLOCK)
  | stacked("out_blocks", 1, SKIP_BLOCK)
  | stacked("decode_blocks", 2, SKIP_BLOCK),
}


@pytest.mark.parametrize("variant", TREES)
def test_parameter_tree_matches_old_checkpoints(variant):
  flat = flax.traverse_util.flatten_dict(abstract_params(small(variant)), sep="/")
  assert {path: leaf.shape for path, leaf in flat.items()} == TREES[variant]


def test_bottleneck_adds_a_kernel_and_narrows_another():
  model = small("DiT").clone(patch_bottleneck=3)
  flat = flax.traverse_util.flatten_dict(abstract_params(model), sep="/")
  expected = TREES["DiT"] | {
    "patch_embed/bottleneck/kernel": (16, 3),
    "patch_embed/linear/kernel": (3, 16),
  }
  assert {path: leaf.shape for path, leaf in flat.items()} == expected


# The last entry of every random parameter, drawn with key 3. If these values change, a
# seed no longer gives the same network.
DRAWN = {
  "DiT": {
    "blocks/attention/proj/kernel": -0.06953707,
    "blocks/attention/qkv/kernel": 0.1898004,
    "blocks/fc1/kernel": 0.07258241,
    "blocks/fc2/kernel": 0.01515641,
    "label_embed/table": 0.02017719,
    "patch_embed/linear/kernel": 0.4314528,
    "timestep_embed/fc1/kernel": 0.001689803,
    "timestep_embed/fc2/kernel": 0.005250327,
  },
  "MDT": {
    "blocks/attention/proj/kernel": -0.3813816,
    "blocks/attention/qkv/kernel": 0.1746128,
    "blocks/attention/relative_position_bias": -0.00453441,
    "blocks/fc1/kernel": 0.1155846,
    "blocks/fc2/kernel": 0.1259304,
    "decode_blocks/attention/proj/kernel": -0.4228134,
    "decode_blocks/attention/qkv/kernel": -0.2706876,
    "decode_blocks/attention/relative_position_bias": 0.006857621,
    "decode_blocks/fc1/kernel": -0.04312715,
    "decode_blocks/fc2/kernel": -0.04985547,
    "label_embed/table": 0.02017719,
    "mask_token": 0.004023413,
    "patch_embed/linear/kernel": 0.4314528,
    "side_block/attention/proj/kernel": -0.3204059,
    "side_block/attention/qkv/kernel": -0.2353277,
    "side_block/attention/relative_position_bias": 0.01539332,
    "side_block/fc1/kernel": -0.2273129,
    "side_block/fc2/kernel": -0.005947269,
    "timestep_embed/fc1/kernel": 0.001689803,
    "timestep_embed/fc2/kernel": 0.005250327,
  },
  "MDTv2": {
    "decode_blocks/attention/proj/kernel": -0.4228134,
    "decode_blocks/attention/qkv/kernel": -0.2706876,
    "decode_blocks/attention/relative_position_bias": 0.006857621,
    "decode_blocks/fc1/kernel": -0.04312715,
    "decode_blocks/fc2/kernel": -0.04985547,
    "decode_blocks/skip/kernel": -0.1951844,
    "in_blocks/attention/proj/kernel": -0.3980308,
    "in_blocks/attention/qkv/kernel": -0.1277219,
    "in_blocks/attention/relative_position_bias": 0.004786941,
    "in_blocks/fc1/kernel": -0.1572057,
    "in_blocks/fc2/kernel": 0.153746,
    "label_embed/table": 0.02017719,
    "mask_token": 0.004023413,
    "out_blocks/attention/proj/kernel": -0.2071059,
    "out_blocks/attention/qkv/kernel": -0.03380419,
    "out_blocks/attention/relative_position_bias": -0.003354311,
    "out_blocks/fc1/kernel": -0.07767498,
    "out_blocks/fc2/kernel": -0.09643979,
    "out_blocks/skip/kernel": -0.1921558,
    "patch_embed/linear/kernel": 0.4314528,
    "side_block/attention/proj/kernel": -0.3204059,
    "side_block/attention/qkv/kernel": -0.2353277,
    "side_block/attention/relative_position_bias": 0.01539332,
    "side_block/fc1/kernel": -0.2273129,
    "side_block/fc2/kernel": -0.005947269,
    "timestep_embed/fc1/kernel": 0.001689803,
    "timestep_embed/fc2/kernel": 0.005250327,
  },
}


@functools.cache
def fresh(variant):
  params = jax.jit(init_params, static_argnums=0)(small(variant), jax.random.key(3))
  return flax.traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize(
  ("variant", "path"), [(variant, path) for variant in DRAWN for path in DRAWN[variant]]
)
def test_seed_gives_the_recorded_initial_parameters(variant, path):
  last = np.asarray(fresh(variant)[path]).ravel()[-1]
  assert last == pytest.approx(DRAWN[variant][path], rel=1e-4)
