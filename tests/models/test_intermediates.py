"""Intermediates of `model.apply`: block outputs and attention weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model
from mdt_jax.models.blocks import Block
from mdt_jax.models.embeddings import (
  PatchEmbed,
  TimestepEmbed,
  relative_position_index,
)
from mdt_jax.models.masking import keep_tokens, random_token_mask, restore_tokens
from tests import reference

# (depth, decode_depth): each stack has more than one block.
DEPTHS = {"DiT": (3, 1), "MDT": (5, 2), "MDTv2": (6, 2)}
CASES = [
  ("DiT", False),
  ("MDT", False),
  ("MDT", True),
  ("MDTv2", False),
  ("MDTv2", True),
]
X, T = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([30.0, 700.0])
Y = jnp.array([1, 2])
MASK = random_token_mask(jax.random.key(1), 2, 16, 6)
INDEX = relative_position_index(4)[None]


def make(variant, **attributes):
  depth, decode_depth = DEPTHS[variant]
  return create_model(
    variant=variant,
    input_size=8,
    hidden_size=16,
    num_heads=2,
    num_classes=10,
    depth=depth,
    decode_depth=decode_depth,
    **attributes,
  )


@functools.cache
def params_of(variant):
  return reference.random_params(make(variant))


def intermediates(model, masked, capture=True):
  @jax.jit
  def run(params):
    return model.apply(
      {"params": params},
      X,
      T,
      Y,
      MASK if masked else None,
      capture_intermediates=capture,
      mutable=["intermediates"],
    )[1]

  return run(params_of(model.variant)).get("intermediates", {})


@functools.cache
def blocks_by_hand(variant, masked):
  """Maps the name of each stack to the outputs of its blocks, applied one by one."""
  params, found = params_of(variant), {}
  block = Block(num_heads=2, mlp_ratio=4.0, bias_rows=0 if variant == "DiT" else 52)

  def apply(name, layer, *args):
    own = params[name]
    if layer is not None:
      own = jax.tree.map(lambda p: p[layer], own)
    x, _ = jax.jit(block.apply)({"params": own}, *args)
    found.setdefault(name, []).append(x)
    return x

  patch_embed, timestep_embed = PatchEmbed(2, 16), TimestepEmbed(16)
  embedded = patch_embed.apply({"params": params["patch_embed"]}, X)
  tokens = embedded = embedded + params["pos_embed"]
  c = timestep_embed.apply({"params": params["timestep_embed"]}, T)
  c = c + params["label_embed"]["table"][Y]
  depth, decode_depth = DEPTHS[variant]
  if variant == "DiT":
    for layer in range(depth):
      tokens = apply("blocks", layer, tokens, c, None)
    return found

  index, length = jnp.asarray(INDEX), depth - decode_depth
  kept = index
  if masked:
    tokens = keep_tokens(tokens, MASK)
    kept = index[0][MASK.ids_keep[:, :, None], MASK.ids_keep[:, None, :]]
  if variant == "MDT":
    for layer in range(length):
      tokens = apply("blocks", layer, tokens, c, kept)
  else:
    for layer in range(length // 2):
      tokens = apply("in_blocks", layer, tokens, c, kept)
    for layer in range(length // 2):
      skip = found["in_blocks"][-1 - layer]
      tokens = apply("out_blocks", layer, tokens, c, kept, skip)
  positions = params["decode_pos_embed"]
  if masked:
    tokens = restore_tokens(tokens, params["mask_token"], MASK) + positions
    predicted = apply("side_block", None, tokens, c, index)
    tokens = jnp.where(MASK.removed[..., None], predicted, tokens)
  else:
    tokens = tokens + positions
  skip = embedded if variant == "MDTv2" else None
  for layer in range(decode_depth):
    tokens = apply("decode_blocks", layer, tokens, c, index, skip)
  return found


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("unroll", [1, -1])
@pytest.mark.parametrize(("variant", "masked"), CASES)
def test_output_of_every_block_is_captured(variant, masked, unroll, remat):
  found = intermediates(make(variant, unroll=unroll, remat=remat), masked)
  expected = blocks_by_hand(variant, masked)
  assert {name for name in found if name.endswith(("blocks", "block"))} == set(expected)
  for name, outputs in expected.items():
    captured = found[name]["__call__"][0][0]
    whole = outputs[0] if name == "side_block" else np.stack(outputs)
    np.testing.assert_allclose(captured, whole, rtol=1e-5, atol=1e-5, err_msg=name)


def softmax_by_hand(qkv, table, index):
  """(B, K, 3, heads, d) -> weights (B, heads, K, K), float64."""
  query, key, _ = np.moveaxis(np.asarray(qkv, np.float64), 2, 0)
  logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
  if table is not None:
    logits = logits + np.moveaxis(np.asarray(table)[index], -1, 1)
  weights = np.exp(logits)
  return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  ("variant", "masked", "stack", "layer"),
  [
    ("DiT", False, "blocks", 2),
    ("MDT", True, "blocks", 1),
    ("MDTv2", True, "in_blocks", 1),
    ("MDTv2", False, "decode_blocks", 0),
  ],
)
def test_sown_attention_weights_match_the_softmax(variant, masked, stack, layer):
  found = intermediates(make(variant, sow_attention=True), masked)[stack]["attention"]
  params = params_of(variant)[stack]["attention"]
  table = params.get("relative_position_bias")
  encoder_masked = masked and stack != "decode_blocks"
  ids = np.asarray(MASK.ids_keep)
  index = INDEX[0][ids[:, :, None], ids[:, None, :]] if encoder_masked else INDEX
  expected = softmax_by_hand(
    found["qkv"]["__call__"][0][layer], None if table is None else table[layer], index
  )
  weights = found["attention_weights"][0]
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights[layer], expected, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("unroll", [1, -1])
def test_attention_weights_are_sown_without_other_intermediates(unroll, remat):
  model = make(
    "MDTv2", sow_attention=True, dtype="bfloat16", unroll=unroll, remat=remat
  )
  found = intermediates(model, True, capture=False)
  shapes = {
    name: {key: leaf.shape for key, (leaf,) in stack["attention"].items()}
    for name, stack in found.items()
  }
  kept, whole = (2, 2, 6, 6), (2, 2, 16, 16)
  assert shapes == {
    "in_blocks": {"attention_weights": (2, *kept)},
    "out_blocks": {"attention_weights": (2, *kept)},
    "side_block": {"attention_weights": whole},
    "decode_blocks": {"attention_weights": (2, *whole)},
  }
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
  for leaf in jax.tree.leaves(found):
    np.testing.assert_allclose(leaf.sum(-1), 1, atol=1e-5)


def test_attention_weights_are_not_sown_by_default():
  assert intermediates(make("MDT"), True, capture=False) == {}


def test_attention_weights_are_not_sown_when_immutable():
  """Training and sampling with `sow_attention` therefore have no extra cost."""

  def computation(model):
    function = lambda params: model.apply({"params": params}, X, T, Y)  # noqa: E731
    return jax.jit(function).lower(params_of("MDT")).as_text()

  assert computation(make("MDT", sow_attention=True)) == computation(make("MDT"))
