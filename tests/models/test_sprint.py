"""SPRINT: agreement with the released code (snap-research/Sprint)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.diffusion.guidance import guided
from mdt_jax.models.masking import TokenMask, random_token_mask, token_mask_from_noise
from mdt_jax.models.registry import abstract_params, init_params
from mdt_jax.models.sprint import rotations
from mdt_jax.pretrained.torch_mdt import from_torch
from tests import reference
from tests.models import test_tread

NUM_CLASSES = 10
RECORDED = reference.load("sprint")
TINY = dict(input_size=8, in_channels=4, num_classes=10, hidden_size=16, num_heads=2)


@functools.cache
def load_model(**overrides):
  attributes, params = from_torch(reference.FIXTURES / "sprint.pt", input_size=12)
  return create_model(**{**attributes, **overrides}), params


def images(name):
  return jnp.asarray(reference.to_nhwc(RECORDED[name]))


def raster(name):
  """Recorded noise (B, G / 2, G / 2, 4), place = 2 row + column, as (B, L)."""
  noise = jnp.asarray(RECORDED[name])
  batch, rows, columns, _ = noise.shape
  noise = noise.reshape(batch, rows, columns, 2, 2).swapaxes(2, 3)
  return noise.reshape(batch, -1)


def recorded_mask():
  return load_model()[0].token_mask(raster("mask_noise"), 9)


@functools.cache
def apply(options=(), **overrides):
  """Compiled (token_mask, path_drop) -> output at the recorded inputs."""
  model, params = load_model(**overrides)
  inputs = images("x"), RECORDED["t"], RECORDED["y"]
  options = dict(options)

  @jax.jit
  def run(mask=None, path_drop=None):
    return model.apply(
      {"params": params}, *inputs, mask, path_drop=path_drop, **options
    )

  return run


@functools.cache
def masked():
  """Output and intermediate values of the recorded pass with a mask."""
  output, state = apply((("mutable", ("intermediates",)),))(recorded_mask())
  return output, state["intermediates"]


def test_forward_matches_reference():
  reference.assert_matches(
    "SPRINT, forward pass",
    reference.to_nchw(apply()()),
    RECORDED["out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize(
  ("prefix", "num_keep", "key"),
  [
    ("", 9, "ids_keep"),
    ("", 9, "ids_restore"),
    ("structured_0.5/", 18, "ids_keep"),
    ("random/", 21, "ids_keep"),
    ("random/", 21, "ids_restore"),
  ],
)
def test_mask_keeps_the_recorded_tokens_in_their_order(prefix, num_keep, key):
  noise = jnp.asarray(RECORDED["random/noise"])
  if prefix != "random/":
    noise = raster("mask_noise" if not prefix else f"{prefix}noise")
  model, _ = load_model(mask_type="random" if prefix == "random/" else "structured")
  mask = model.token_mask(noise, num_keep)
  np.testing.assert_array_equal(getattr(mask, key), RECORDED[f"{prefix}{key}"])


def test_mask_removes_the_recorded_tokens():
  np.testing.assert_array_equal(recorded_mask().removed, RECORDED["mask"])


@pytest.mark.parametrize(
  "options", [{"unroll": 1}, {"unroll": -1}, {"remat": "full"}, {"forward_mode": True}]
)
def test_masked_forward_matches_reference(options):
  reference.assert_matches(
    "SPRINT, masked forward pass from the recorded noise",
    reference.to_nchw(apply(**options)(recorded_mask())),
    RECORDED["out_masked"],
    reference.FORWARD_TOLERANCE,
  )


def test_forward_with_a_random_mask_matches_reference():
  mask = token_mask_from_noise(jnp.asarray(RECORDED["random/noise"]), 21)
  reference.assert_matches(
    "SPRINT, forward pass with a random mask",
    reference.to_nchw(apply()(mask)),
    RECORDED["random/out"],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("name", ["shallow", "deep_kept", "fused"])
def test_tokens_match_reference(name):
  reference.assert_matches(
    "SPRINT, shallow, deep and fused tokens",
    masked()[1][name][0],
    RECORDED[f"tokens_{name}"],
    reference.FORWARD_TOLERANCE,
  )


def network(x, t, y):
  model, params = load_model()
  return model.apply({"params": params}, x, t, y)


def without_deep_path(x, t, y):
  """The network with a mask that keeps no tokens."""
  model, params = load_model()
  mask = model.token_mask(jnp.zeros((len(x), model.num_tokens)), 0)
  return model.apply({"params": params}, x, t, y, mask)


def path_drop_guided(y, scale):
  """Guidance by path drop: the second pass has neither label nor deep path."""

  def model_fn(x, t):
    weak = without_deep_path(x, t, jnp.full_like(y, NUM_CLASSES))
    return weak + scale * (network(x, t, y) - weak)

  return model_fn


def test_guided_output_matches_reference():
  """All channels are guided."""
  y, scale = jnp.asarray(RECORDED["y"]), float(RECORDED["cfg/scale"])
  model_fn = guided(network, y, NUM_CLASSES, scale=scale, power=0.0, channels=None)
  reference.assert_matches(
    "SPRINT, guided output",
    reference.to_nchw(jax.jit(model_fn)(images("x"), RECORDED["t"])),
    RECORDED["cfg/out"],
    reference.LOOP_TOLERANCE,
  )


def test_output_guided_by_path_drop_matches_reference():
  model_fn = path_drop_guided(jnp.asarray(RECORDED["y"]), float(RECORDED["cfg/scale"]))
  reference.assert_matches(
    "SPRINT, output guided by path drop",
    reference.to_nchw(jax.jit(model_fn)(images("x"), RECORDED["t"])),
    RECORDED["pdg/out"],
    reference.LOOP_TOLERANCE,
  )


# Properties.


def test_parameters_do_not_depend_on_the_mask_and_the_size():
  model = create_model("SPRINT-S/2", **TINY, depth=7)
  x, y = jnp.zeros((1, 8, 8, 4)), jnp.array([0])
  for num_keep in (0, 4):
    mask = random_token_mask(jax.random.key(0), 1, 16, num_keep)
    found = jax.eval_shape(model.init, jax.random.key(0), x, y, y, mask)["params"]
    assert found == abstract_params(model)
  assert abstract_params(model.clone(input_size=(12, 20))) == abstract_params(model)


def test_mask_token_is_frozen_at_a_narrow_normal_start():
  model = create_model("SPRINT-S/2", **TINY)
  assert model.frozen == ("mask_token",)
  wide = model.clone(hidden_size=1024)
  draw = jax.jit(lambda key: init_params(wide, key)["mask_token"])
  token = draw(jax.random.key(0))
  assert float(token.std()) == pytest.approx(0.02, rel=0.1)


def test_mask_of_all_tokens_changes_nothing():
  model, _ = load_model()
  mask = random_token_mask(jax.random.key(0), 4, model.num_tokens, model.num_tokens)
  error = reference.relative_error(apply()(mask), np.asarray(apply()()))
  assert error < reference.FORWARD_TOLERANCE


def test_dropped_path_equals_a_mask_without_tokens():
  """In each sample alone; the others keep their deep path."""
  model, _ = load_model()
  nothing = model.token_mask(jnp.zeros((4, model.num_tokens)), 0)
  assert nothing.ids_keep.shape == (4, 0)
  weak, full = apply()(nothing), apply()(recorded_mask())
  dropped = jnp.array([False, True, False, True])
  found = apply()(recorded_mask(), dropped)
  expected = jnp.where(dropped[:, None, None, None], weak, full)
  np.testing.assert_allclose(found, expected, atol=1e-5 * float(abs(full).max()))
  assert float(abs(weak - full).max()) > 0.01 * float(abs(full).max())


def test_mask_without_tokens_skips_the_middle_blocks():
  model, params = load_model()

  mask = model.token_mask(jnp.zeros((4, model.num_tokens)), 0)
  inputs = images("x"), RECORDED["t"], RECORDED["y"]

  def output(params):
    return (model.apply({"params": params}, *inputs, mask) ** 2).sum()

  gradient = jax.jit(jax.grad(output))(params)
  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["middle_blocks"]))
  assert gradient["fuse"]["kernel"].any()


def test_removed_tokens_have_no_influence_on_the_deep_path():
  """With other blocks that do nothing, and without the shallow half of the fusion."""
  model, params = load_model()
  params = jax.tree.map(jnp.asarray, params)
  for stack in ("encoder_blocks", "decode_blocks"):
    modulation = jax.tree.map(jnp.zeros_like, params[stack]["modulation"])
    params = {**params, stack: {**params[stack], "modulation": modulation}}
  fuse = params["fuse"]
  params["fuse"] = {**fuse, "kernel": fuse["kernel"].at[model.hidden_size :].set(0)}
  mask = recorded_mask()

  def output(x):
    out = model.apply({"params": params}, x, RECORDED["t"], RECORDED["y"], mask)
    return (out**2).sum()

  gradient = np.asarray(jax.jit(jax.grad(output))(images("x")))
  kept = test_tread.as_pixels(~np.asarray(mask.removed))
  kept = np.broadcast_to(kept, gradient.shape)
  assert (gradient[~kept] == 0).all()
  assert (gradient[kept] != 0).all()


def test_every_group_keeps_the_same_number_of_tokens():
  model = create_model("SPRINT-S/2", **{**TINY, "input_size": (16, 24)})
  rng = np.random.default_rng(0)
  noise = rng.random((3, model.num_tokens), np.float32)
  for side, kept in ((2, 1), (2, 2), (4, 6), (4, 2)):
    num_keep = model.num_tokens * kept // side**2
    mask = model.token_mask(noise, num_keep)
    assert mask.ids_keep.shape == (3, num_keep)
    grid = ~np.asarray(mask.removed).reshape(3, 8 // side, side, 12 // side, side)
    assert (grid.sum(axis=(2, 4)) == kept).all()
    assert_is_consistent(mask)
    by_group = noise.reshape(3, 8 // side, side, 12 // side, side)
    smallest = np.where(grid, by_group, 2).min(axis=(2, 4))
    assert (smallest > np.where(grid, -1, by_group).max(axis=(2, 4))).all()


def assert_is_consistent(mask: TokenMask) -> None:
  """`ids_restore` inverts the order of kept and removed tokens."""
  for ids, restore, removed in zip(
    mask.ids_keep, mask.ids_restore, mask.removed, strict=True
  ):
    order = np.concatenate([ids, np.flatnonzero(removed)])
    np.testing.assert_array_equal(order[restore], np.arange(len(removed)))


@pytest.mark.parametrize(
  ("overrides", "num_keep"),
  [
    ({"mask_type": "random"}, 4),
    ({"input_size": (6, 8)}, 3),
    ({"input_size": 12, "patch_size": 2}, 13),
    ({"input_size": 8}, 5),
  ],
)
def test_other_masks_keep_the_tokens_with_the_smallest_noise(overrides, num_keep):
  model = create_model("SPRINT-S/2", **{**TINY, **overrides})
  noise = np.random.default_rng(0).random((2, model.num_tokens), np.float32)
  found, expected = (
    make(noise, num_keep) for make in (model.token_mask, token_mask_from_noise)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
  ("ratio", "kept"), [(0, 16), (0.75, 4), (0.5, 8), (0.625, 6), (0.875, 2), (0.41, 9)]
)
def test_number_of_kept_tokens_is_the_released_one(ratio, kept):
  assert create_model("SPRINT-S/2", **TINY).num_kept(ratio) == kept


def test_rotations_of_a_rectangle_turn_by_row_and_by_column():
  found = np.asarray(rotations((3, 5), 8))
  assert found.shape == (15, 2, 4)
  angles = np.stack([[2, 2 * 0.01, 4, 4 * 0.01]])  # theta: 1 and 10000^(-2 / 4)
  expected = np.concatenate([np.cos(angles), np.sin(angles)])
  np.testing.assert_allclose(found[2 * 5 + 4], expected, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_transposed_input_does_not_swap_rows_and_columns(masked):
  """Rotations by row and column differ, so a network that mixed them up fails."""
  high, params = load_model(input_size=(8, 16))
  wide, _ = load_model(input_size=(16, 8))
  x = np.random.default_rng(0).standard_normal((2, 8, 16, 4)).astype(np.float32)
  t, y = np.array([0.2, 0.7], np.float32), np.array([1, 2])
  noise = np.random.default_rng(1).random((2, 4, 8), np.float32)
  masks = None, None
  if masked:
    masks = (
      model.token_mask(n.reshape(2, 32), 8)
      for model, n in ((high, noise), (wide, noise.swapaxes(1, 2)))
    )
  first, second = masks
  expected = jax.jit(high.apply)({"params": params}, x, t, y, first)
  swapped = {"params": transposed(params)}
  found = jax.jit(wide.apply)(swapped, x.swapaxes(1, 2), t, y, second)
  error = reference.relative_error(found.swapaxes(1, 2), np.asarray(expected))
  assert error < reference.FORWARD_TOLERANCE


def transposed(params):
  """Parameters of the network on the transposed input: heads of 16, patches of 2."""

  def change(path, value):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("q_norm", "k_norm")):
      return np.roll(value, 8, axis=-1)
    if "qkv" in name:  # (…, 3, heads, 16): rows and columns of queries and keys swap
      turned = np.roll(value, 8, axis=-1)
      axis = value.ndim - 3
      first, _ = np.split(turned, [2], axis=axis)
      return np.concatenate([first, np.split(value, [2], axis=axis)[1]], axis=axis)
    if name == "patch_embed/linear/kernel":
      return value.reshape(2, 2, 4, -1).swapaxes(0, 1).reshape(value.shape)
    if name.startswith("final_layer/linear"):
      pixels = value.reshape(*value.shape[:-1], 2, 2, 4).swapaxes(-3, -2)
      return pixels.reshape(value.shape)
    return value

  return jax.tree_util.tree_map_with_path(change, params)


def test_bfloat16_stays_close_to_float32():
  found = apply(dtype="bfloat16")(recorded_mask())
  assert found.dtype == jnp.float32
  assert reference.relative_error(found, np.asarray(masked()[0])) < 0.05


@pytest.mark.parametrize(
  ("size", "depths"), [("S", (2, 8)), ("B", (2, 8)), ("L", (2, 20)), ("XL", (2, 24))]
)
def test_presets_have_the_released_depths(size, depths):
  model = create_model(f"SPRINT-{size}/2")
  assert (model.encoder_depth, model.middle_depth, model.decode_depth) == (*depths, 2)


def test_xl_has_the_released_number_of_parameters():
  params = abstract_params(create_model("SPRINT-XL/2"))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert round(count / 1e6) == 677


@pytest.mark.parametrize(
  ("attributes", "setting", "value", "accepted"),
  [
    ({"encoder_depth": 0}, "encoder_depth", 0, "must be at least 1"),
    ({"decode_depth": 0}, "decode_depth", 0, "must be at least 1"),
    ({"depth": 4}, "depth", 4, "must be above encoder_depth + decode_depth = 4"),
    ({"encoder_depth": 12}, "encoder_depth", 12, "must lie in [1, depth - decode_"),
    ({"decode_depth": 10}, "decode_depth", 10, "must lie in [1, depth - encoder_"),
    ({"encoder_depth": 1, "decode_depth": 11}, "decode_depth", 11, "must lie in [1, "),
    ({"hidden_size": 60, "num_heads": 6}, "hidden_size", 60, "must be divisible by 4 "),
    ({"mask_type": "blocks"}, "mask_type", "blocks", "accepted are structured, random"),
  ],
)
def test_invalid_attribute_is_refused(attributes, setting, value, accepted):
  with pytest.raises(SettingError) as error:
    create_model("SPRINT-B/2", **attributes)
  assert (error.value.setting, error.value.value) == (setting, value)
  assert error.value.accepted.startswith(accepted)
