"""Initial parameters: the distributions of the released code, and zero output.

Every tensor of every variant has exactly one initialization rule.
"""

from __future__ import annotations

import functools
import itertools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.models.embeddings import sincos_positions
from mdt_jax.models.masking import random_token_mask
from mdt_jax.models.mdt import MDT
from mdt_jax.models.microdit import MicroDiT
from mdt_jax.models.registry import abstract_params, init_params

WIDTH, PATCH, CHANNELS, GRID, HEADS, MLP = 64, 2, 4, 8, 4, 4
SIZES = dict(
  input_size=GRID * PATCH,
  patch_size=PATCH,
  in_channels=CHANNELS,
  hidden_size=WIDTH,
  num_heads=HEADS,
  mlp_ratio=MLP,
  num_classes=100,
)
# Every stack has two or three layers.
MODELS = {
  "DiT": MDT(variant="DiT", depth=3, **SIZES),
  "SiT": MDT(variant="SiT", depth=3, learn_sigma=False, **SIZES),
  "MDT": MDT(variant="MDT", depth=5, decode_depth=2, **SIZES),
  "MDTv2": MDT(variant="MDTv2", depth=7, decode_depth=3, **SIZES),
  "MicroDiT": MicroDiT(depth=3, mixer_depth=2, **SIZES),
}

# Xavier uniform: the end of a parameter's path -> (fan in, fan out).
FANS = {
  "patch_embed/linear/kernel": (PATCH * PATCH * CHANNELS, WIDTH),
  "attention/qkv/kernel": (WIDTH, 3 * WIDTH),
  "attention/proj/kernel": (WIDTH, WIDTH),
  "fc1/kernel": (WIDTH, MLP * WIDTH),
  "fc2/kernel": (MLP * WIDTH, WIDTH),
  "skip/kernel": (2 * WIDTH, WIDTH),
}
NORMAL = (
  "timestep_embed/fc1/kernel",
  "timestep_embed/fc2/kernel",
  "label_embed/table",
  "mask_token",
  "relative_position_bias",
)
ZERO = ("/bias", "modulation/linear/kernel", "final_layer/linear/kernel")
POSITIONS = ("pos_embed",)  # Also matches decode_pos_embed.
NUM_STDS = 4  # Accepted deviation of an estimate, in standard errors.


@functools.cache
def fresh(variant):
  """Maps the path of each initial parameter to its array."""
  params = jax.jit(init_params, static_argnums=0)(MODELS[variant], jax.random.key(0))
  return jax.tree.map(np.asarray, flax.traverse_util.flatten_dict(params, sep="/"))


def paths_of(variant):
  return flax.traverse_util.flatten_dict(abstract_params(MODELS[variant]), sep="/")


def rule_of(path):
  if path.endswith(NORMAL):  # Before FANS, as the timestep MLP has fc1 and fc2 too.
    return "normal"
  for rule, ends in (("zero", ZERO), ("xavier", FANS), ("positions", POSITIONS)):
    if path.endswith(tuple(ends)):
      return rule
  raise AssertionError(f"{path} falls under no rule")


def tensors(*rules):
  """Parametrizes a test over (variant, path) of all tensors with these rules."""
  return pytest.mark.parametrize(
    ("variant", "path"),
    [
      (variant, path)
      for variant in MODELS
      for path in paths_of(variant)
      if rule_of(path) in rules
    ],
  )


def layers_of(variant, path):
  """The tensors of a stack, one for each layer, as in the released code."""
  array = fresh(variant)[path]
  return array if "blocks/" in path else array[None]


def bound_of(path):
  fans = next(fans for end, fans in FANS.items() if path.endswith(end))
  return math.sqrt(6 / sum(fans))


@pytest.mark.parametrize(
  ("variant", "counts"),
  [
    ("DiT", dict(zero=13, xavier=5, normal=3, positions=1)),
    ("SiT", dict(zero=13, xavier=5, normal=3, positions=1)),
    ("MDT", dict(zero=25, xavier=13, normal=7, positions=2)),
    ("MDTv2", dict(zero=33, xavier=19, normal=8, positions=2)),
  ],
)
def test_each_rule_covers_the_expected_number_of_tensors(variant, counts):
  rules = [rule_of(path) for path in paths_of(variant)]
  assert {rule: rules.count(rule) for rule in counts} == counts


@pytest.mark.parametrize("variant", MODELS)
def test_parameters_are_float32(variant):
  assert {array.dtype.name for array in fresh(variant).values()} == {"float32"}


@tensors("zero")
def test_biases_modulations_and_the_last_layer_are_zero(variant, path):
  assert not fresh(variant)[path].any()


@tensors("xavier")
def test_linear_layers_have_the_expected_shapes(variant, path):
  fans = next(fans for end, fans in FANS.items() if path.endswith(end))
  shapes = {layer.shape for layer in layers_of(variant, path)}
  # Attention kernels have an axis for the heads.
  if path.endswith("qkv/kernel"):
    assert shapes == {(WIDTH, 3, HEADS, WIDTH // HEADS)}
  elif path.endswith("proj/kernel"):
    assert shapes == {(HEADS, WIDTH // HEADS, WIDTH)}
  else:
    assert shapes == {fans}


@tensors("xavier")
def test_linear_layers_stay_within_the_xavier_bound(variant, path):
  for layer in layers_of(variant, path):
    assert np.abs(layer).max() <= bound_of(path)


@tensors("xavier")
def test_linear_layers_reach_the_xavier_bound(variant, path):
  for layer in layers_of(variant, path):
    assert np.abs(layer).max() > (1 - 10 / layer.size) * bound_of(path)


@tensors("xavier")
def test_linear_layers_have_the_std_of_a_uniform_distribution(variant, path):
  for layer in layers_of(variant, path):
    off = NUM_STDS * math.sqrt(0.2 / layer.size)
    assert layer.std() == pytest.approx(bound_of(path) / math.sqrt(3), rel=off)


def test_bottleneck_is_xavier_uniform_on_a_patch():
  """As JiT's released code initialises both convolutions, as linear layers."""
  model = MODELS["DiT"].clone(patch_bottleneck=8)
  params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
  for layer, fans in (("bottleneck", (16, 8)), ("linear", (8, WIDTH))):
    kernel, bound = params["patch_embed"][layer]["kernel"], math.sqrt(6 / sum(fans))
    assert kernel.shape == fans
    assert 0.9 * bound < np.abs(kernel).max() <= bound


@tensors("normal")
def test_tables_and_timestep_mlp_have_std_0_02(variant, path):
  for layer in layers_of(variant, path):
    off = NUM_STDS / math.sqrt(2 * layer.size)
    assert layer.std() == pytest.approx(0.02, rel=off)


@tensors("normal")
def test_tables_and_timestep_mlp_have_mean_zero(variant, path):
  for layer in layers_of(variant, path):
    assert abs(layer.mean()) < NUM_STDS * 0.02 / math.sqrt(layer.size)


@tensors("normal")
def test_tables_and_timestep_mlp_have_normal_tails(variant, path):
  """4.6 % of a normal distribution is beyond two standard deviations."""
  array = fresh(variant)[path]
  share, size = 0.0455, array.size
  off = NUM_STDS * math.sqrt(share / size)
  assert abs((np.abs(array) > 0.04).mean() - share) < off


@pytest.mark.parametrize("variant", ["MDT", "MDTv2"])
def test_bias_table_has_three_unused_rows(variant):
  table = fresh(variant)["side_block/attention/relative_position_bias"]
  assert table.shape == ((2 * GRID - 1) ** 2 + 3, HEADS)


@tensors("xavier", "normal")
def test_layers_of_a_stack_are_uncorrelated(variant, path):
  for first, second in itertools.combinations(layers_of(variant, path), 2):
    correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    assert abs(correlation) < NUM_STDS / math.sqrt(first.size)


@pytest.mark.parametrize("variant", MODELS)
def test_no_two_tensors_share_random_numbers(variant):
  starts = [
    tuple(layer.ravel()[:8] / layer.std())
    for path in paths_of(variant)
    if rule_of(path) in ("xavier", "normal")
    for layer in layers_of(variant, path)
  ]
  assert len(set(starts)) == len(starts)


@tensors("positions")
def test_positions_start_as_sines_and_cosines(variant, path):
  expected = sincos_positions(WIDTH, GRID)
  np.testing.assert_array_equal(fresh(variant)[path], expected)


@pytest.mark.parametrize("variant", ["MDT", "MDTv2"])
def test_both_position_tables_start_equal(variant):
  params = fresh(variant)
  np.testing.assert_array_equal(params["pos_embed"], params["decode_pos_embed"])


@pytest.mark.parametrize(
  ("variant", "masked"),
  [("DiT", False), ("MDT", False), ("MDT", True), ("MDTv2", False), ("MDTv2", True)],
)
def test_initial_network_outputs_zeros(variant, masked):
  model = MODELS[variant]
  params = flax.traverse_util.unflatten_dict(fresh(variant), sep="/")
  x = jax.random.normal(jax.random.key(1), (2, GRID * PATCH, GRID * PATCH, CHANNELS))
  t, y = jnp.array([0, 999]), jnp.array([1, model.num_classes])
  mask = random_token_mask(jax.random.key(2), 2, GRID**2, 10) if masked else None
  output = jax.jit(model.apply)({"params": params}, x, t, y, mask)
  assert not output.any()
