"""Frozen parameters and learning rates by pattern."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.optimizers import create_optimizer, learning_rate_schedule
from mdt_jax.parameter_groups import frozen_paths, rates_of_paths, without_frozen
from mdt_jax.pretrained.tensors import flatten, unflatten
from tests import reference
from tests.training.tiny import tiny_config, tiny_dit_config

PATHS = (
  "blocks/modulation/linear/bias",
  "blocks/modulation/linear/kernel",
  "blocks/attention/qkv/bias",
  "blocks/attention/qkv/kernel",
  "blocks/attention/relative_position_bias",
  "final_layer/modulation/linear/kernel",
  "label_embed/table",
  "pos_embed",
)


def trained(*patterns):
  return set(PATHS) - frozen_paths("frozen", patterns, PATHS)


def test_few_shot_trains_labels_and_modulation():
  assert trained("few_shot") == {
    "blocks/modulation/linear/bias",
    "blocks/modulation/linear/kernel",
    "final_layer/modulation/linear/kernel",
    "label_embed/table",
  }


def test_difffit_trains_biases_and_labels():
  assert trained("difffit") == {
    "blocks/modulation/linear/bias",
    "blocks/attention/qkv/bias",
    "label_embed/table",
  }


def test_patterns_are_searched_for_in_paths():
  assert trained("^blocks/", "pos_embed$") == {
    "final_layer/modulation/linear/kernel",
    "label_embed/table",
  }


@pytest.mark.parametrize(
  ("patterns", "message"),
  [
    (("(",), r"frozen = '\(': must be a regular expression"),
    (("no_such",), r"frozen = 'no_such': matches no parameter"),
    (("few_shot", "l", "m"), r"frozen = 'few_shot,l,m': would freeze every parameter"),
  ],
)
def test_bad_patterns_are_refused(patterns, message):
  with pytest.raises(SettingError, match=message):
    frozen_paths("frozen", patterns, PATHS)


def test_parameters_that_no_run_trains_may_be_named():
  """The position embedding of a DiT is always frozen."""
  found = frozen_paths("frozen", ("^label_embed",), PATHS, {"pos_embed"})
  assert found == {"label_embed/table", "pos_embed"}
  assert frozen_paths("frozen", ("pos_embed",), PATHS, {"pos_embed"}) == {"pos_embed"}
  assert frozen_paths("frozen", (), PATHS, {"pos_embed"}) == {"pos_embed"}
  trained = set(PATHS) - {"pos_embed"}
  with pytest.raises(SettingError, match="would freeze every parameter"):
    frozen_paths("frozen", trained, PATHS, {"pos_embed"})


def test_rates_that_agree_in_six_digits_stay_apart():
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  rates = {"a": 0.5, "b": 0.5000001}
  optimizer = create_optimizer("sgd", 1.0, rates=rates, peak=1.0)
  found = steps(optimizer, params, params, 1)
  assert found["a"][0] > found["b"][0]


def test_first_pattern_decides_the_rate():
  found = rates_of_paths("rates", ("label_embed:1e-3", "e:2e-4"), PATHS)
  assert found["label_embed/table"] == 1e-3
  assert found["pos_embed"] == 2e-4


@pytest.mark.parametrize(
  ("item", "message"),
  [
    ("label_embed", "must be PATTERN:RATE"),
    ("label_embed:fast", "must be PATTERN:RATE"),
    ("label_embed:0", "must be PATTERN:RATE"),
    ("label_embed:inf", "must be PATTERN:RATE"),
    (":1e-3", "must be PATTERN:RATE"),
    ("no_such:1e-3", "matches no parameter"),
  ],
)
def test_bad_rates_are_refused(item, message):
  with pytest.raises(SettingError, match=message):
    rates_of_paths("rates", (item,), PATHS)


def steps(optimizer, gradients, params, count=3):
  """Parameters after steps with the same gradients."""
  state = optimizer.init(params)
  for _ in range(count):
    updates, state = optimizer.update(gradients, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params


@pytest.mark.parametrize("name", ["adan", "adamw"])
def test_rates_equal_those_of_optimizers_of_their_own(name):
  """Also the gradient norm that is clipped is that of all parameters together."""
  rng = np.random.default_rng(0)
  params = {"a": {"b": jnp.ones((3, 2))}, "c": jnp.ones(4)}
  gradients = jax.tree.map(lambda p: 5 * rng.standard_normal(p.shape), params)
  schedule = learning_rate_schedule("linear", 0.1, 10)
  options = dict(weight_decay=0.1, clip_norm=1.0)
  both = create_optimizer(name, schedule, **options, rates={"a/b": 0.02}, peak=0.1)
  slow = create_optimizer(name, lambda n: schedule(n) * 0.2, **options)
  fast = create_optimizer(name, schedule, **options)
  found = steps(both, gradients, params)
  np.testing.assert_allclose(
    found["a"]["b"], steps(slow, gradients, params)["a"]["b"], rtol=1e-6
  )
  np.testing.assert_allclose(found["c"], steps(fast, gradients, params)["c"], rtol=1e-6)


def test_frozen_parameters_do_not_move_and_do_not_count_in_the_norm():
  params = {"a": {"b": jnp.ones(3), "c": jnp.ones(3)}, "d": jnp.ones(2)}
  gradients = jax.tree.map(lambda p: 3.0 * p, params)
  optimizer = create_optimizer("sgd", 1.0, clip_norm=1.0, frozen={"a/b", "d"})
  found = steps(optimizer, gradients, params, 1)
  np.testing.assert_array_equal(found["a"]["b"], params["a"]["b"])
  np.testing.assert_array_equal(found["d"], params["d"])
  np.testing.assert_allclose(found["a"]["c"], 1 - 1 / np.sqrt(3), rtol=1e-6)


def test_state_of_frozen_top_level_parameters_is_that_of_old_checkpoints():
  """DiT's position embedding was frozen by its name."""
  params = {"pos_embed": jnp.ones(3), "rest": {"kernel": jnp.ones(2)}}
  by_name = without_frozen(create_optimizer("adamw", 0.1), ("pos_embed",))
  by_path = without_frozen(create_optimizer("adamw", 0.1), {"pos_embed"})
  states = [jax.tree.structure(o.init(params)) for o in (by_name, by_path)]
  assert states[0] == states[1]
  assert "MaskedNode" in str(states[0])


def test_run_names_the_parameters_it_does_not_train():
  experiment = build(tiny_dit_config(**{"optimizer.frozen": "few_shot"}))
  assert "pos_embed" in experiment.frozen  # that of DiT is always frozen
  assert "label_embed/table" not in experiment.frozen
  assert "blocks/fc1/kernel" in experiment.frozen


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"optimizer.frozen": "fc1,pos_embd"}, r"config.optimizer.frozen = 'pos_embd'"),
    ({"optimizer.learning_rates": "a"}, r"config.optimizer.learning_rates = 'a'"),
    (  # Without effect: what it matches is frozen.
      {"optimizer.frozen": "few_shot", "optimizer.learning_rates": "fc1:1e-3"},
      r"config.optimizer.learning_rates = 'fc1:1e-3': matches no parameter that is",
    ),
    (
      {"optimizer.frozen": "few_shot", "optimizer.clip_shards": 2},
      r"config.optimizer.clip_shards = 2: must be 1 if parameters are frozen",
    ),
  ],
)
def test_build_names_the_bad_setting(settings, message):
  with pytest.raises(SettingError, match=f"^{message}"):
    build(tiny_config(**settings))


def test_parameters_survive_a_round_trip_through_paths():
  params = reference.random_params(build(tiny_dit_config()).model)
  jax.tree.map(np.testing.assert_array_equal, unflatten(flatten(params)), params)
