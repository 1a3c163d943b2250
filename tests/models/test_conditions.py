"""Conditions: labels, label dropout, the null label, custom conditions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model
from mdt_jax.models.condition_registry import create_condition
from mdt_jax.models.conditions import (
  CONDITIONS,
  CaptionCondition,
  Condition,
  LabelCondition,
)
from mdt_jax.models.embeddings import LabelEmbed, drop_labels
from mdt_jax.models.registry import abstract_params

TINY = dict(
  input_size=8, hidden_size=16, depth=2, num_heads=2, decode_depth=2, num_classes=10
)
LABELS = jnp.arange(64, dtype=jnp.int32) % 10


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_pass_drops_labels_with_bernoulli_draws(count, dropout):
  key = jax.random.key(4)
  dropped = LabelCondition(10, dropout).drop(key, LABELS, count)
  copies = jnp.stack([LABELS] * count, axis=1)
  expected = jnp.where(jax.random.bernoulli(key, dropout, copies.shape), 10, copies)
  np.testing.assert_array_equal(dropped, expected)
  np.testing.assert_array_equal(dropped, drop_labels(key, copies, 10, dropout))
  assert dropped.dtype == LABELS.dtype


def test_passes_drop_labels_independently():
  dropped = LabelCondition(10, 0.5).drop(jax.random.key(0), LABELS, 2) == 10
  assert (dropped[:, 0] != dropped[:, 1]).any()


def test_label_condition_reads_the_labels_of_the_batch():
  batch = {"image": jnp.zeros((64, 8, 8, 4)), "label": LABELS}
  np.testing.assert_array_equal(LabelCondition(10, 0.1).of_batch(batch), LABELS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_labels_that_are_not_integers_are_refused(dtype):
  condition, labels = LabelCondition(10, 0.1), jnp.zeros((4,), dtype)
  with pytest.raises(ValueError, match=dtype):
    condition.of_batch({"label": labels})
  with pytest.raises(ValueError, match=dtype):
    condition.drop(jax.random.key(0), labels, 2)


@pytest.mark.parametrize(("dropout", "rows"), [(0.1, 11), (0.0, 10)])
def test_label_table_has_a_null_row_only_with_dropout(dropout, rows):
  model = create_model("MDTv2-S/2", **TINY, label_dropout=dropout)
  assert abstract_params(model)["label_embed"]["table"].shape == (rows, 16)


def test_null_label_is_num_classes():
  np.testing.assert_array_equal(LabelCondition(10, 0.1).null_like(LABELS), 10)


def test_null_label_is_refused_without_dropout():
  with pytest.raises(ValueError, match="label_dropout"):
    LabelCondition(10, 0.0).null_like(LABELS)


def test_choose_cycles_through_the_classes():
  np.testing.assert_array_equal(LabelCondition(3, 0.1).choose(5), [0, 1, 2, 0, 1])


# Captions.

WORDS = CaptionCondition(length=3, channels=5, dropout=0.5)


def test_captions_of_a_batch_are_dropped_independently_in_each_pass():
  y = WORDS.of_batch({"caption": jnp.ones((64, 3, 5))})
  dropped = WORDS.drop(jax.random.key(0), y, 2)
  assert (dropped.shape, dropped.dtype) == ((64, 2, 3, 5), y.dtype)
  is_dropped = np.asarray((dropped == 0).all((2, 3)))
  np.testing.assert_array_equal(is_dropped, (dropped == 0).any((2, 3)))
  assert 0.3 < is_dropped.mean() < 0.7
  assert (is_dropped[:, 0] != is_dropped[:, 1]).any()


def test_null_caption_is_zero_and_needs_dropout():
  y = jnp.ones((2, 3, 5))
  np.testing.assert_array_equal(WORDS.null_like(y), jnp.zeros_like(y))
  with pytest.raises(ValueError, match="label_dropout"):
    dataclasses.replace(WORDS, dropout=0.0).null_like(y)


@pytest.mark.parametrize(
  "captions", [jnp.ones((2, 3, 4)), jnp.ones((2, 5)), jnp.ones((2, 3, 5), jnp.int32)]
)
def test_captions_of_another_form_are_refused(captions):
  with pytest.raises(ValueError, match="captions must be"):
    WORDS.of_batch({"caption": captions})


def test_other_networks_read_the_mean_of_a_caption():
  model = create_model("DiT-S/2", **TINY, condition=WORDS)
  params = abstract_params(model)
  assert "label_embed" not in params
  assert params["caption_embed"]["mlp"]["fc1"]["kernel"].shape == (5, 16)


def test_unknown_condition_is_refused():
  with pytest.raises(SettingError, match="text") as error:
    create_condition("text", num_classes=10, dropout=0.1)
  assert error.value.setting == "condition"


def test_network_is_conditioned_on_labels_by_default():
  model = create_model("MDTv2-S/2", **TINY, label_dropout=0.2)
  assert model.conditioning == LabelCondition(10, 0.2)


@pytest.mark.parametrize("condition", [None, "label"])
def test_label_condition_is_stored_as_none(condition):
  assert create_model("MDTv2-S/2", condition=condition).condition is None


@pytest.mark.parametrize("condition", ["text", 3])
def test_create_model_refuses_an_unknown_condition(condition):
  with pytest.raises(SettingError) as error:
    create_model("MDTv2-S/2", condition=condition)
  assert (error.value.setting, error.value.value) == ("condition", condition)


@dataclasses.dataclass(frozen=True)
class Shifted(Condition):
  """A custom condition: labels count from 1, and 0 is the null label."""

  num_classes: int
  dropout: float

  def of_batch(self, batch):
    return batch["label"] + 1

  def embedder(self, hidden_size, dtype):
    return LabelEmbed(
      self.num_classes + 1, hidden_size, self.dropout, dtype, name="shifted_embed"
    )

  def drop(self, key, y, count):
    return drop_labels(key, jnp.stack([y] * count, axis=1), 0, self.dropout)

  def null_like(self, y):
    return jnp.zeros_like(y)

  def dummy(self, batch):
    return jnp.ones((batch,), jnp.int32)

  def choose(self, count):
    return np.ones((count,), np.int32)


def test_network_uses_the_embedder_of_a_custom_condition():
  model = create_model("MDTv2-S/2", **TINY, condition=Shifted(4, 0.1))
  params = abstract_params(model)
  assert params["shifted_embed"]["table"].shape == (6, 16)
  assert "label_embed" not in params


def test_registered_condition_is_found_by_name(monkeypatch):
  monkeypatch.setitem(CONDITIONS, "shifted", Shifted)
  model = create_model("MDTv2-S/2", **TINY, label_dropout=0.3, condition="shifted")
  assert model.condition == Shifted(10, 0.3)


def test_network_with_a_condition_is_hashable():
  """It can be a static argument of jax.jit."""
  model = create_model("MDTv2-S/2", **TINY, condition=Shifted(4, 0.1))
  assert hash(model) == hash(model.clone())
