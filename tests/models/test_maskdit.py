"""MaskDiT: agreement with the released code (Anima-Lab/MaskDiT) on a small network."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mdt_jax import SettingError, create_model, create_process
from mdt_jax.diffusion.guidance import guided
from mdt_jax.models import LabelCondition
from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.masking import random_token_mask, token_mask_from_noise
from mdt_jax.models.registry import abstract_params, init_params
from mdt_jax.pretrained.torch_mdt import from_torch
from tests import reference

NUM_CLASSES = 10
RECORDED = reference.load("maskdit")
CONFIG = json.loads(str(RECORDED["config"]))
EDM = create_process("edm")
# An encoder and a decoder of different widths, numbers of blocks and heads.
SMALL = dict(input_size=8, in_channels=3, num_classes=5, hidden_size=16, num_heads=4)
SMALL |= dict(depth=3, decode_depth=2, decoder_hidden_size=24, decoder_num_heads=2)


@functools.cache
def load_model(**overrides):
  path = reference.FIXTURES / "maskdit.pt"
  attributes, params = from_torch(path, num_heads=2, decoder_num_heads=2)
  return create_model(**{**attributes, **overrides}), params


def images(name):
  return jnp.asarray(reference.to_nhwc(RECORDED[name]))


def labels(name):
  """Labels of one-hot rows; a row of zeros is the null label."""
  rows = RECORDED[name]
  return jnp.asarray(np.where(rows.any(1), rows.argmax(1), NUM_CLASSES))


def recorded_mask():
  num_keep = load_model()[0].num_kept(float(RECORDED["mask_ratio"]))
  return token_mask_from_noise(jnp.asarray(RECORDED["mask_noise"]), num_keep)


@functools.cache
def outputs(masked, **overrides):
  """Output of the recorded pass, and the outputs of all layers."""
  model, params = load_model(**overrides)
  inputs = images("net_x"), RECORDED["net_t"], labels("y_onehot")
  run = functools.partial(
    model.apply, capture_intermediates=True, mutable=["intermediates"]
  )
  mask = recorded_mask() if masked else None
  output, state = jax.jit(run)({"params": params}, *inputs, mask)
  return output, state["intermediates"]


def denoised(output, x, sigma):
  """D of an output of the network."""
  log_sigma = jnp.log(jnp.broadcast_to(sigma, len(x)))
  return reference.to_nchw(EDM.to_x0(output, x, log_sigma))


@pytest.mark.parametrize("name", ["net_out", "D_out"])
def test_forward_matches_reference(name):
  output, _ = outputs(masked=False)
  found = reference.to_nchw(output)
  if name == "D_out":
    found = denoised(output, images("net_x"), RECORDED["sigma"])
  what, tolerance = "MaskDiT, forward pass", reference.FORWARD_TOLERANCE
  reference.assert_matches(what, found, RECORDED[name], tolerance)


def test_null_label_matches_reference():
  """The released code embeds a row of zeros: the zero vector."""
  model, params = load_model()
  x, null = images("net_x"), jnp.full(4, NUM_CLASSES)
  output = jax.jit(model.apply)({"params": params}, x, RECORDED["net_t"], null)
  reference.assert_matches(
    "MaskDiT, forward pass",
    denoised(output, x, RECORDED["sigma"]),
    RECORDED["D_out_no_labels"],
    reference.FORWARD_TOLERANCE,
  )


def test_mask_keeps_the_recorded_tokens_in_their_order():
  mask = recorded_mask()
  np.testing.assert_array_equal(mask.ids_keep, RECORDED["ids_keep"])
  np.testing.assert_array_equal(mask.ids_restore, RECORDED["ids_restore"])
  np.testing.assert_array_equal(mask.removed, RECORDED["mask"] == 1)


@pytest.mark.parametrize(
  "options", [{"unroll": 1}, {"unroll": -1}, {"remat": "full"}, {"forward_mode": True}]
)
def test_masked_forward_matches_reference(options):
  output, _ = outputs(masked=True, **options)
  reference.assert_matches(
    "MaskDiT, masked forward pass",
    denoised(output, images("net_x"), RECORDED["sigma"]),
    RECORDED["D_out_masked"],
    reference.FORWARD_TOLERANCE,
  )


def test_tokens_between_encoder_and_decoder_match_reference():
  _, found = outputs(masked=True)
  c = sum(found[f"{name}_embed"]["__call__"][0] for name in ("timestep", "label"))
  for name, tokens in {
    "encoder_out_masked": found["blocks"]["__call__"][0][0][-1],
    "cond": c,
    "decoder_layer_out_masked": found["decoder_layer"]["__call__"][0],
  }.items():
    reference.assert_matches(
      "MaskDiT, tokens between encoder and decoder",
      tokens,
      RECORDED[name],
      reference.FORWARD_TOLERANCE,
    )


@pytest.mark.parametrize(("scale", "name"), [(1.5, "scale1p5"), (4.0, "scale4")])
def test_guided_output_matches_reference(scale, name):
  """All channels are guided."""
  model, params = load_model()
  sigma = float(RECORDED["cfg_sigma"])
  t = jnp.full(4, np.log(sigma))
  x = images("x") * EDM.alpha(t)[:, None, None, None]

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  y = labels("cfg_y_onehot")
  model_fn = guided(network, y, NUM_CLASSES, scale=scale, power=0.0, channels=None)
  output = jax.jit(model_fn)(x, EDM.network_time(t))
  reference.assert_matches(
    "MaskDiT, guided output",
    denoised(output, x, sigma),
    RECORDED[f"cfg_D_{name}"],
    reference.LOOP_TOLERANCE,
  )


@pytest.mark.parametrize(("width", "grid"), [(16, 3), (24, 6), (32, 6)])
def test_positions_match_reference(width, grid):
  reference.assert_matches(
    "MaskDiT, position embeddings",
    sincos_positions(width, grid),
    RECORDED[f"pos_embed/dim{width}_grid{grid}"],
    1e-6,
  )


def test_kept_tokens_are_as_many_as_recorded():
  rows = RECORDED["mask_len"]
  for side in (4, 5, 6, 16):
    model = create_model("MaskDiT-S/2", input_size=2 * side)
    found = [model.num_kept(ratio) for length, ratio, _ in rows if length == side**2]
    assert found == [kept for length, _, kept in rows if length == side**2]
  assert {4**2, 5**2, 6**2, 16**2} <= set(rows[:, 0])


# Properties.


def test_xl_has_as_many_parameters_as_released():
  """730,541,200, frozen ones included."""
  leaves = jax.tree.leaves(abstract_params(create_model("MaskDiT-XL/2")))
  assert sum(leaf.size for leaf in leaves) == 730_541_200


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_label_table_has_no_row_for_the_null_label(dropout):
  model = create_model("MaskDiT-S/2", **SMALL, label_dropout=dropout)
  assert abstract_params(model)["label_embed"]["table"].shape == (5, 16)
  assert model.conditioning == LabelCondition(5, dropout, null="zero")


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_null_label_is_the_zero_vector(dropout):
  embed = LabelCondition(5, dropout, null="zero").embedder(16, jnp.float32)
  table = np.arange(1, 81, dtype=np.float32).reshape(5, 16)
  found = embed.apply({"params": {"table": table}}, jnp.array([0, 4, 5, 6, -1]))
  np.testing.assert_array_equal(found[:2], table[[0, 4]])
  np.testing.assert_array_equal(found[2:], np.zeros((3, 16)))


def test_null_label_needs_label_dropout():
  with pytest.raises(ValueError, match="label_dropout"):
    LabelCondition(5, 0.0, null="zero").null_like(jnp.array([0]))


def test_network_without_a_mask_does_not_use_the_mask_token():
  model, params = load_model()
  inputs = images("net_x"), RECORDED["net_t"], labels("y_onehot")

  def change(token, mask):
    changed = {**params, "mask_token": token}
    return model.apply({"params": changed}, *inputs, mask).sum()

  gradient = jax.jit(jax.grad(change))
  token = jnp.asarray(params["mask_token"])
  assert (gradient(token, None) == 0).all()
  assert (gradient(token, recorded_mask()) != 0).all()


def test_mask_of_all_tokens_changes_nothing():
  model, params = load_model()
  mask = random_token_mask(jax.random.key(0), 4, model.num_tokens, model.num_tokens)
  inputs = (images("net_x"), RECORDED["net_t"], labels("y_onehot"))
  found = jax.jit(model.apply)({"params": params}, *inputs, mask)
  expected = RECORDED["net_out"]
  assert reference.relative_error(reference.to_nchw(found), expected) < 1e-5


def test_removed_tokens_have_no_influence():
  model, params = load_model()
  mask = recorded_mask()

  def energy(x):
    inputs = x, RECORDED["net_t"], labels("y_onehot")
    return (model.apply({"params": params}, *inputs, mask) ** 2).sum()

  gradient = np.asarray(jax.jit(jax.grad(energy))(images("net_x")))
  kept = np.asarray(~mask.removed).reshape(4, 6, 6).repeat(2, 1).repeat(2, 2)
  assert (gradient[~kept] == 0).all()
  assert (gradient[kept] != 0).all()


@functools.cache
def small(**overrides):
  model = create_model("MaskDiT-S/2", **{**SMALL, **overrides})
  return model, reference.random_params(model)


@pytest.mark.parametrize("num_keep", [None, 5])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_rectangle_has_the_shape_of_its_input(learn_sigma, num_keep):
  """With a type of bfloat16, in one loop over blocks and in another."""
  shape = (4, 8, 3)
  outputs = []
  for options in ({"unroll": 1}, {"unroll": -1, "dtype": "bfloat16"}):
    options |= {"input_size": (4, 8), "learn_sigma": learn_sigma}
    model, params = small(**options)
    mask = num_keep and random_token_mask(jax.random.key(0), 2, 8, num_keep)
    x = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    t, y = jnp.array([-0.5, 0.3]), jnp.array([1, 5])
    outputs.append(jax.jit(model.apply)({"params": params}, x, t, y, mask))
  full, half = outputs
  assert full.shape == half.shape == (2, 4, 8, 6 if learn_sigma else 3)
  assert half.dtype == jnp.float32
  assert reference.relative_error(half, full) < 0.05


def test_parameters_do_not_depend_on_the_mask():
  model, _ = small()
  x, y = jnp.zeros((1, 8, 8, 3)), jnp.array([0])
  mask = random_token_mask(jax.random.key(0), 1, 16, 8)
  with_mask = jax.eval_shape(model.init, jax.random.key(0), x, y, y, mask)["params"]
  assert with_mask == abstract_params(model)


def test_decoder_has_its_own_width_and_the_conditioning_of_the_encoder():
  params = flatten_dict(abstract_params(small()[0]), sep="/")
  shapes = {
    "blocks/attention/qkv/kernel": (3, 16, 3, 4, 4),
    "decode_blocks/attention/qkv/kernel": (2, 24, 3, 2, 12),
    "decode_blocks/modulation/linear/kernel": (2, 16, 6 * 24),
    "decoder_layer/linear/kernel": (16, 24),
    "final_layer/modulation/linear/kernel": (16, 2 * 24),
    "final_layer/linear/kernel": (24, 12),
    "decode_pos_embed": (16, 24),
    "mask_token": (24,),
  }
  assert {path: params[path].shape for path in shapes} == shapes


def test_output_and_layers_between_start_at_zero():
  """As released; see initialize_weights there."""
  init = jax.jit(init_params, static_argnums=0)
  params = flatten_dict(init(small()[0], jax.random.key(0)), sep="/")
  zero = {path for path, value in params.items() if not value.any()}
  kernels = {path for path in params if path.endswith("kernel")}
  for part in ("decoder_layer", "final_layer", "blocks", "decode_blocks"):
    assert f"{part}/modulation/linear/kernel" in zero
  assert {"decoder_layer/linear/kernel", "final_layer/linear/kernel"} <= zero
  assert len(kernels & zero) == 6
  assert abs(float(params["mask_token"].std()) - 0.02) < 0.01


@pytest.mark.parametrize(
  ("attributes", "setting", "value", "accepted"),
  [
    ({"decode_depth": 0}, "decode_depth", 0, "must be at least 1"),
    ({"decoder_hidden_size": 0}, "decoder_hidden_size", 0, "must be at least 1"),
    ({"decoder_num_heads": 0}, "decoder_num_heads", 0, "must be at least 1"),
    ({"decoder_num_heads": 7}, "decoder_hidden_size", 512, "must be divisible by dec"),
    ({"decoder_hidden_size": 50}, "decoder_hidden_size", 50, "must be divisible by "),
    ({"mlp_ratio": 0.0}, "mlp_ratio", 0.0, "must be above 0"),
  ],
)
def test_invalid_attribute_is_refused(attributes, setting, value, accepted):
  with pytest.raises(SettingError) as error:
    create_model("MaskDiT-S/2", **attributes)
  assert (error.value.setting, error.value.value) == (setting, value)
  assert error.value.accepted.startswith(accepted)


def test_decoder_may_be_deeper_than_the_encoder():
  assert create_model("MaskDiT-S/2", depth=1).decode_depth == 8


@pytest.mark.parametrize("name", ["DiT-S/2", "MDT-S/2"])
def test_other_networks_have_no_decoder_width(name):
  with pytest.raises(SettingError) as error:
    create_model(name, decoder_hidden_size=64)
  assert error.value.setting == "decoder_hidden_size"
