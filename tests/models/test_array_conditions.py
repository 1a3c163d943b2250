"""Conditions that are arrays: vectors, tokens, and several at once."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.models import (
  JointCondition,
  LabelCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.condition_registry import create_condition
from mdt_jax.models.flops import forward_flops
from mdt_jax.models.registry import abstract_params, init_params
from mdt_jax.pretrained.adaptation import Adaptation
from mdt_jax.pretrained.tensors import flatten, unflatten
from tests import reference

LABEL = LabelCondition(10, 0.1)
VECTOR = VectorCondition("clip", 5, 0.1)
TOKENS = TokensCondition("t5", 3, 6, 0.1)
ALL = JointCondition((LABEL, VECTOR, TOKENS))
CONDITIONS = {
  "vector": VECTOR,
  "tokens": TOKENS,
  "label+vector": JointCondition((LABEL, VECTOR)),
  "label+vector+tokens": ALL,
}
VARIANTS = ("DiT", "SiT", "MDT", "MDTv2", "TREAD", "MaskDiT", "MicroDiT", "SPRINT")
# All conditions with MDTv2, the largest one with each network.
CASES = [("MDTv2", name) for name in CONDITIONS]
CASES += [
  (variant, "label+vector+tokens") for variant in VARIANTS if variant != "MDTv2"
]
OWN = {
  "MDT": {"decode_depth": 2},
  "MDTv2": {"decode_depth": 2},
  "TREAD": {"route_start": 1, "route_end": 2},
  "MaskDiT": {"decode_depth": 2, "decoder_hidden_size": 8, "decoder_num_heads": 1},
  "MicroDiT": {"mixer_depth": 1},
  "SPRINT": {"encoder_depth": 1, "decode_depth": 1},
}


def tiny(variant="DiT", **attributes):
  sizes = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=4)
  own = OWN.get(variant, {})
  return create_model(variant=variant, num_heads=2, **sizes, **own, **attributes)


def make_batch(count=4, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "label": np.arange(count, dtype=np.int32) % 10,
    "clip": rng.standard_normal((count, 5)).astype(np.float32),
    "t5": rng.standard_normal((count, 3, 6)).astype(np.float32),
    "t5_mask": np.arange(3)[None] <= np.arange(count)[:, None] % 3,
  }


initialise = jax.jit(init_params, static_argnums=0)


@functools.cache
def params_of(model):
  return reference.random_params(model)


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def run(model, params, y, mask=None):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((len(y), *model.input_shape)).astype(np.float32)
  t = np.linspace(0, 1, len(y), dtype=np.float32)
  return np.asarray(compiled(model)({"params": params}, x, t, y, mask))


# y.


def test_vector_is_followed_by_one_and_null_is_zero():
  y = VECTOR.of_batch(make_batch())
  np.testing.assert_array_equal(y[:, :5], make_batch()["clip"])
  np.testing.assert_array_equal(y[:, 5], 1)
  np.testing.assert_array_equal(VECTOR.null_like(y), jnp.zeros((4, 6)))


def test_padding_of_tokens_is_zero():
  batch = make_batch()
  y = np.asarray(TOKENS.of_batch(batch))
  np.testing.assert_array_equal(y[..., 6], batch["t5_mask"])
  expected = np.where(batch["t5_mask"][..., None], batch["t5"], 0)
  np.testing.assert_array_equal(y[..., :6], expected)
  del batch["t5_mask"]
  np.testing.assert_array_equal(TOKENS.of_batch(batch)[..., 6], 1)


def test_joint_condition_splits_into_its_parts():
  batch = make_batch()
  found = ALL.split(ALL.of_batch(batch))
  for part, y in zip(ALL.parts, found, strict=True):
    np.testing.assert_array_equal(y, part.of_batch(batch))
  assert found[0].dtype == jnp.int32


@pytest.mark.parametrize("name", CONDITIONS)
def test_dummy_and_choose_have_the_form_of_y(name):
  condition = CONDITIONS[name]
  y = condition.of_batch(make_batch())
  assert condition.dummy(4).shape == condition.choose(4).shape == y.shape


@pytest.mark.parametrize(
  ("condition", "change", "match"),
  [
    (VECTOR, {"clip": np.ones((4, 6))}, "'clip' must have the shape"),
    (TOKENS, {"t5": np.ones((4, 2, 6))}, "'t5' must have the shape"),
    (TOKENS, {"t5_mask": np.ones((4, 2))}, "t5_mask must be"),
  ],
)
def test_arrays_of_another_shape_are_refused(condition, change, match):
  with pytest.raises(ValueError, match=match):
    condition.of_batch({**make_batch(), **change})


def test_missing_array_is_named():
  with pytest.raises(ValueError, match="no 'clip', but label"):
    VECTOR.of_batch({"label": np.zeros(2)})


# Drops.


def nulls(condition, y):
  """(…) whether each y is the null condition."""
  flat = np.asarray(y == condition.null_like(y))
  return flat.reshape(*y.shape[:2], -1).all(axis=-1)


@pytest.mark.parametrize("condition", [VECTOR, TOKENS, ALL])
def test_passes_drop_conditions_independently_and_whole(condition):
  half = (
    dataclasses.replace(
      condition,
      parts=tuple(dataclasses.replace(part, dropout=0.5) for part in condition.parts),
    )
    if condition is ALL
    else dataclasses.replace(condition, dropout=0.5)
  )
  y = half.of_batch(make_batch(64))
  dropped = half.drop(jax.random.key(0), y, 2)
  assert dropped.shape == (64, 2, *y.shape[1:])
  is_null = nulls(half, dropped)
  assert 0.3 < is_null.mean() < 0.7
  assert (is_null[:, 0] != is_null[:, 1]).any()
  kept = np.asarray(dropped)[~is_null]
  copies = np.stack([y] * 2, axis=1)[~is_null]
  np.testing.assert_array_equal(kept, copies)


def test_parts_are_dropped_apart_with_their_own_probabilities():
  parts = tuple(
    dataclasses.replace(part, dropout=rate)
    for part, rate in zip(ALL.parts, (0.0, 0.2, 0.8), strict=True)
  )
  apart = JointCondition(parts, together=False)
  y = apart.of_batch(make_batch(1024))
  label, vector, tokens = apart.split(apart.drop(jax.random.key(0), y, 1)[:, 0])
  assert (label < 10).all()
  # The null condition keeps what is never dropped.
  np.testing.assert_array_equal(apart.split(apart.null_like(y))[0], apart.split(y)[0])
  assert (apart.split(apart.null_like(y))[1] == 0).all()
  shares = [float((value == 0).all(axis=-1).mean()) for value in (vector, tokens[:, 0])]
  np.testing.assert_allclose(shares, (0.2, 0.8), atol=0.05)


@pytest.mark.parametrize("condition", [VECTOR, TOKENS])
def test_null_needs_dropout(condition):
  condition = dataclasses.replace(condition, dropout=0.0)
  with pytest.raises(ValueError, match="dropout is 0"):
    condition.null_like(condition.dummy(2))


# Networks.


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_new_condition_changes_nothing_at_first(variant, name):
  """As config.init does: the parameters of a network with labels are kept."""
  source = tiny(variant)
  target = tiny(variant, condition=CONDITIONS[name])
  adaptation = Adaptation(source, target)
  old = flatten(params_of(source))
  fresh = flatten(initialise(target, jax.random.key(0)))
  params = unflatten(
    {
      path: adaptation.start(path, old.__getitem__, np.asarray(fresh[path]))
      for path in adaptation.starts
    }
  )
  batch = make_batch()
  has_label = "label" in name
  # Without a label, the network computes what it did for the null label.
  labels = batch["label"] if has_label else np.full(4, 10, np.int32)
  condition = CONDITIONS[name]
  expected = run(source, params_of(source), labels)
  for y in (condition.of_batch(batch), condition.null_like(condition.dummy(4))):
    if has_label and (y[:, :1] == 10).all():
      expected = run(source, params_of(source), np.full(4, 10, np.int32))
    found = run(target, params, np.asarray(y))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_every_part_of_a_condition_reaches_the_output(variant, name):
  model = tiny(variant, condition=CONDITIONS[name])
  condition = CONDITIONS[name]
  mask = None
  if model.takes_mask or model.has_route or model.defers_mask:
    noise = np.random.default_rng(2).random((4, model.num_tokens), np.float32)
    mask = model.token_mask(noise, 8)
  batch = make_batch()
  output = run(model, params_of(model), condition.of_batch(batch), mask)
  arrays = [*condition.arrays(), *(["label"] if condition.label else [])]
  for array in arrays:
    changed = {**batch, array: make_batch(seed=1)[array]}
    if array == "label":
      changed[array] = batch[array] + 1
    other = run(model, params_of(model), condition.of_batch(changed), mask)
    assert (np.abs(other - output).reshape(4, -1).max(axis=1) > 1e-4).all(), array


def test_padding_does_not_reach_the_output():
  model = tiny("DiT", condition=TOKENS)
  batch = make_batch()
  padded = np.where(batch["t5_mask"][..., None], batch["t5"], 7)
  first = run(model, params_of(model), TOKENS.of_batch(batch))
  second = run(model, params_of(model), TOKENS.of_batch({**batch, "t5": padded}))
  np.testing.assert_array_equal(first, second)


def test_order_of_tokens_does_not_matter():
  """Cross-attention and mean have no positions: encoders put these into the tokens."""
  model = tiny("DiT", condition=TOKENS)
  batch = make_batch()
  turned = {**batch, "t5": batch["t5"][:, ::-1], "t5_mask": batch["t5_mask"][:, ::-1]}
  first, second = (
    run(model, params_of(model), TOKENS.of_batch(b)) for b in (batch, turned)
  )
  np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_train_drops_conditions():
  condition = dataclasses.replace(VECTOR, dropout=0.5)
  model = tiny("DiT", condition=condition)
  y = condition.of_batch(make_batch(16))
  x, t = jnp.ones((16, 8, 8, 1)), jnp.ones(16)

  @jax.jit
  def both(params):
    rngs = {"label_dropout": jax.random.key(0)}
    dropped = model.apply({"params": params}, x, t, y, train=True, rngs=rngs)
    given, null = (
      model.apply({"params": params}, x, t, value)
      for value in (y, condition.null_like(y))
    )
    return dropped, given, null

  dropped, given, null = both(params_of(model))
  is_null = jnp.isclose(dropped, null, atol=1e-6).all(axis=(1, 2, 3))
  is_given = jnp.isclose(dropped, given, atol=1e-6).all(axis=(1, 2, 3))
  assert (is_null ^ is_given).all() and 0 < is_null.sum() < 16


@pytest.mark.parametrize("name", CONDITIONS)
def test_flops_match_xla(name):
  """XLA also counts sums, normalisations and activations, as in test_step_flops."""
  condition = CONDITIONS[name]
  sizes = dict(input_size=16, hidden_size=384, num_heads=6, depth=4, unroll=-1)
  model = create_model("DiT-S/2", **sizes, condition=condition)
  inputs = jnp.ones((1, *model.input_shape)), jnp.ones(1), condition.dummy(1)
  lowered = jax.jit(model.apply).lower({"params": abstract_params(model)}, *inputs)
  counted = lowered.cost_analysis()["flops"]
  assert forward_flops(model) == pytest.approx(counted, rel=0.02)


def test_label_beside_a_vector_keeps_its_null_label():
  made = create_condition(
    "label+vector", num_classes=10, dropout=0.1, null="zero", vector_size=5
  )
  assert made.label == LabelCondition(10, 0.1, null="zero")


# By name.


def test_condition_is_built_from_settings():
  made = create_condition(
    "label+tokens", num_classes=10, dropout=0.2, tokens="t5", tokens_length=3,
    tokens_size=6, drop="apart", tokens_dropout=0.4,
  )  # fmt: skip
  expected = (LabelCondition(10, 0.2), TokensCondition("t5", 3, 6, 0.4))
  assert made == JointCondition(expected, together=False)


@pytest.mark.parametrize(
  ("name", "options", "setting"),
  [
    ("label+text", {}, "condition"),
    ("vector+vector", {"vector_size": 4}, "condition"),
    ("vector", {}, "vector_size"),
    ("vector", {"vector_size": 4, "vector": "label"}, "vector"),
    (
      "vector+tokens",
      {"vector_size": 4, "tokens_size": 4, "tokens_length": 4, "vector": "tokens_mask"},
      "vector",
    ),
    (["label"], {}, "condition"),
    ("vector", {"vector_size": 1}, "vector_size"),
    ("tokens", {"tokens_size": 4}, "tokens_length"),
    ("tokens", {"tokens_length": 4}, "tokens_size"),
    ("label+vector", {"vector_size": 4, "drop": "never"}, "drop"),
    ("label+vector", {"vector_size": 4, "vector_dropout": 0.5}, "vector_dropout"),
    ("label", {"drop": "apart", "vector_dropout": 0.5}, "vector_dropout"),
    (
      "label+vector",
      {"vector_size": 4, "drop": "apart", "vector_dropout": 1.0},
      "vector_dropout",
    ),
  ],
)
def test_invalid_settings_are_named(name, options, setting):
  with pytest.raises(SettingError) as error:
    create_condition(name, num_classes=10, dropout=0.1, **options)
  assert error.value.setting == setting


def test_one_number_needs_no_norm():
  made = create_condition(
    "vector", num_classes=1, dropout=0.1, vector_size=1, vector_norm=False
  )
  assert made == VectorCondition("vector", 1, 0.1, norm=False)
