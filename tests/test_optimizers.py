"""Optimizers and schedules, compared with the released Adan and with optax."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.optimizers import (
  adamw,
  adan,
  bias_correction,
  create_optimizer,
  learning_rate_schedule,
)
from mdt_jax.settings import Settings
from tests import reference
from tests.training.tiny import tiny_config

ADAN = reference.load("adan")
ADAN_TOLERANCE = 1e-6
ADAN_STEPS = 6


def steps(optimizer, params, gradients):
  """Returns the parameters after each gradient."""

  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state, history = optimizer.init(params), []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(params)
  return history


# Adan.


@functools.cache
def adan_steps(weight_decay, scale):
  """Parameters after each step with the recorded gradients."""
  optimizer = create_optimizer(
    "adan",
    float(ADAN["lr"]),
    weight_decay=weight_decay,
    clip_norm=float(ADAN["max_grad_norm"]),
  )
  recorded = f"wd{weight_decay}/scale{scale}"
  gradients = [
    {name: ADAN[f"{recorded}/{i}/grad/{name}"] for name in "wb"}
    for i in range(ADAN_STEPS)
  ]
  return steps(optimizer, {name: ADAN[f"init/{name}"] for name in "wb"}, gradients)


@pytest.mark.parametrize("step", range(ADAN_STEPS))
@pytest.mark.parametrize("tensor", ["w", "b"])
@pytest.mark.parametrize("scale", ["1e-05", "0.001", "10.0"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_adan_matches_reference(weight_decay, scale, tensor, step):
  expected = ADAN[f"wd{weight_decay}/scale{scale}/{step}/param/{tensor}"]
  actual = adan_steps(weight_decay, scale)[step][tensor]
  reference.assert_matches(
    "Adan, six steps at three gradient sizes and two weight decays",
    actual,
    expected,
    ADAN_TOLERANCE,
  )


def test_default_moment_decays_match_reference():
  given = create_optimizer(
    "adan", 0.1, **dict(zip(("b1", "b2", "b3"), map(float, ADAN["betas"]), strict=True))
  )
  params, gradients = random_params(), random_gradients(4)
  default = create_optimizer("adan", 0.1)
  assert_same(
    steps(given, params, gradients)[-1], steps(default, params, gradients)[-1]
  )


@pytest.mark.parametrize("decay", ["b1", "b2", "b3"])
def test_each_moment_decay_of_adan_can_be_set(decay):
  params, gradients = random_params(), random_gradients(4)
  default = steps(create_optimizer("adan", 0.1), params, gradients)[-1]
  changed = create_optimizer("adan", 0.1, **{decay: 0.5})
  assert distance(steps(changed, params, gradients)[-1], default) > 1e-3


# The recorded weight decays are too small to distinguish this from
# p (1 - lr weight_decay).
def test_weight_decay_of_adan_is_proximal():
  params = random_params()
  still = jax.tree.map(np.zeros_like, params)
  (after,) = steps(create_optimizer("adan", 0.5, weight_decay=0.2), params, [still])
  assert distance(after, jax.tree.map(lambda p: p / (1 + 0.5 * 0.2), params)) < 1e-6


def test_adan_needs_the_parameters():
  optimizer = adan(0.1)
  params = random_params()
  with pytest.raises(ValueError, match="adan needs the parameters"):
    optimizer.update(params, optimizer.init(params))


# AdamW and Adan.


def random_params(seed=0):
  rng = np.random.default_rng(seed)
  return {
    "pos_embed": rng.standard_normal((3, 4)).astype(np.float32),
    "blocks": {"kernel": rng.standard_normal((4, 4)).astype(np.float32)},
  }


def random_gradients(count):
  return [random_params(seed) for seed in range(1, count + 1)]


def distance(first, second):
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), first, second)
  return float(max(jax.tree.leaves(differences)))


def assert_same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    (dict(), dict(weight_decay=0.0)),
    (dict(weight_decay=0.1), dict(weight_decay=0.1)),
    (dict(b1=0.8, b2=0.95, eps=1e-5), dict(b1=0.8, b2=0.95, eps=1e-5, weight_decay=0)),
  ],
)
def test_adamw_matches_optax(ours, theirs):
  """Apart from the rounding of optax's bias correction."""
  params, gradients = random_params(), random_gradients(4)
  after = steps(create_optimizer("adamw", 0.1, **ours), params, gradients)[-1]
  expected = steps(optax.adamw(0.1, **theirs), params, gradients)[-1]
  assert distance(after, expected) < 1e-5


def test_adamw_has_the_state_of_optax():
  """So old checkpoints can be resumed."""
  params = random_params()
  for rate in (0.1, optax.constant_schedule(0.1)):
    assert_same(adamw(rate).init(params), optax.adamw(rate).init(params))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_steps_are_as_long_as_in_pytorch(weight_decay):
  """optax differs by 7e-6 of the way moved."""
  gradients = [g["blocks"]["kernel"] for g in random_gradients(20)]
  start = np.zeros((4, 4), np.float32)
  rate = 1e-3
  parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
  theirs = torch.optim.AdamW([parameter], lr=rate, weight_decay=weight_decay)
  for gradient in gradients:
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    theirs.step()
  expected = parameter.detach().numpy()
  optimizer = create_optimizer("adamw", rate, weight_decay=weight_decay)
  after = steps(optimizer, start, gradients)[-1]
  assert np.linalg.norm(after - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.98, 0.999, 0.99999])
def test_bias_correction_is_exact_in_float32(decay):
  counts = np.array([1, 2, 3, 10, 1000, 400_000], np.int32)
  expected = [-math.expm1(n * math.log(decay)) if decay else 1.0 for n in counts]
  actual = bias_correction(decay, jnp.asarray(counts))
  np.testing.assert_allclose(actual, expected, rtol=3e-7)


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_gradients_above_clip_norm_are_scaled_down_to_it(name):
  params, gradients = random_params(), random_gradients(4)
  scaled = [optax.tree.scale(0.5 / optax.tree.norm(g), g) for g in gradients]
  clipped = steps(create_optimizer(name, 0.1, clip_norm=0.5), params, gradients)[-1]
  assert (
    distance(steps(create_optimizer(name, 0.1), params, scaled)[-1], clipped) < 1e-5
  )


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_gradients_below_clip_norm_are_unchanged(name):
  params, gradients = random_params(), random_gradients(4)
  clipped = steps(create_optimizer(name, 0.1, clip_norm=1e3), params, gradients)[-1]
  free = steps(create_optimizer(name, 0.1), params, gradients)[-1]
  assert distance(clipped, free) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_schedule_is_evaluated_at_the_step(name):
  params, gradients = random_params(), random_gradients(3)
  history = steps(
    create_optimizer(name, lambda step: jnp.where(step == 1, 0.0, 0.1)),
    params,
    gradients,
  )
  moves = [
    distance(a, b) for a, b in zip([params, *history[:-1]], history, strict=True)
  ]
  assert [move > 1e-6 for move in moves] == [True, False, True]


@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_weight_decay_does_not_change_frozen_parameters(name):
  params = random_params()
  optimizer = create_optimizer(
    name, 0.1, weight_decay=0.1, clip_norm=1.0, frozen=["pos_embed"]
  )
  after = steps(optimizer, params, random_gradients(3))[-1]
  np.testing.assert_array_equal(after["pos_embed"], params["pos_embed"])


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_frozen_parameters_do_not_affect_the_others(name, clip_norm):
  params, gradients = random_params(), random_gradients(3)
  shared = dict(weight_decay=0.1, clip_norm=clip_norm)
  both = create_optimizer(name, 0.1, **shared, frozen=["pos_embed"])
  alone = create_optimizer(name, 0.1, **shared)
  assert_same(
    steps(both, params, gradients)[-1]["blocks"],
    steps(alone, params["blocks"], [g["blocks"] for g in gradients])[-1],
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: create_optimizer("sgdd", 0.1),
      "name = 'sgdd': accepted are adamw, adan, or",
    ),
    (
      lambda: create_optimizer("adamw", 0.1, b3=0.9),
      "b3 = 0.9: is no setting of adamw",
    ),
    (
      lambda: create_optimizer("sgd", 0.1, weight_decay=0.1),
      "weight_decay = 0.1: is no setting of sgd",
    ),
    (lambda: create_optimizer("sgd", 0.1, b1=0.9), "b1 = 0.9: is no setting of sgd"),
    (
      lambda: create_optimizer("sgd", 0.1, eps=1e-6),
      "eps = 1e-06: is no setting of sgd",
    ),
    (
      lambda: create_optimizer("sgd", 0.1, arguments={"momentun": 0.9}),
      "arguments.momentun = 0.9: is no setting of sgd",
    ),
    (
      lambda: create_optimizer("adan", 0.1, arguments={"nesterov": True}),
      "arguments.nesterov = True: is no setting of adan",
    ),
    (
      lambda: create_optimizer("lion", 0.1, arguments={"b1": 0.8}),
      "arguments.b1 = 0.8: must be given as the setting b1",
    ),
    (lambda: create_optimizer("adamw", 0.1, b1=1.5), "b1 = 1.5: must lie in [0, 1)"),
    (
      lambda: learning_rate_schedule("step", 0.1, 10),
      "schedule = 'step': accepted are constant, cosine, linear",
    ),
    (
      lambda: learning_rate_schedule("linear", 0.1, 10, warmup_steps=10),
      "warmup_steps = 10: must lie in [0, num_steps = 10)",
    ),
    (
      lambda: learning_rate_schedule("linear", 0.1, 10, warmup_steps=-1),
      "warmup_steps = -1: must lie in [0, num_steps = 10)",
    ),
  ],
)
def test_error_names_the_setting_its_value_and_accepted_values(call, message):
  with pytest.raises(SettingError) as error:
    call()
  assert str(error.value).startswith(message)


# Other optimizers of optax.


@pytest.mark.parametrize(
  ("name", "ours", "theirs"),
  [
    ("lion", {}, optax.lion(0.1, weight_decay=0.0)),
    (
      "lion",
      dict(b1=0.8, weight_decay=0.1),
      optax.lion(0.1, b1=0.8, weight_decay=0.1),
    ),
    ("sgd", {}, optax.sgd(0.1)),
    ("sgd", dict(arguments={"momentum": 0.9}), optax.sgd(0.1, momentum=0.9)),
    ("yogi", {}, optax.yogi(0.1)),  # The default eps of yogi is 1e-3.
    ("yogi", dict(eps=1e-2), optax.yogi(0.1, eps=1e-2)),
  ],
)
def test_optax_optimizer_takes_the_steps_of_optax(name, ours, theirs):
  params, gradients = random_params(), random_gradients(4)
  made = create_optimizer(name, 0.1, **ours)
  assert_same(steps(made, params, gradients), steps(theirs, params, gradients))


def test_adamw_takes_the_arguments_of_optax():
  params, gradients = random_params(), random_gradients(4)
  made = create_optimizer("adamw", 0.1, arguments={"nesterov": True, "eps_root": 1e-3})
  theirs = optax.nadamw(0.1, eps_root=1e-3, weight_decay=0.0)
  for ours, expected in zip(
    steps(made, params, gradients), steps(theirs, params, gradients), strict=True
  ):
    assert distance(ours, expected) < 1e-5


def test_optax_optimizer_has_the_state_of_optax():
  params = random_params()
  assert_same(
    create_optimizer("sgd", 0.1, arguments={"momentum": 0.9}).init(params),
    optax.sgd(0.1, momentum=0.9).init(params),
  )


@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_optax_optimizers_support_clip_norm_and_frozen(name):
  params, gradients = random_params(), random_gradients(3)
  made = create_optimizer(name, 0.1, clip_norm=0.5, frozen=["pos_embed"])
  after = steps(made, params, gradients)[-1]
  plain = {"lion": optax.lion(0.1, weight_decay=0.0), "sgd": optax.sgd(0.1)}[name]
  blocks = {"blocks": params["blocks"]}
  scaled = [
    optax.tree.scale(
      min(1, 0.5 / float(optax.tree.norm(g["blocks"]))), {"blocks": g["blocks"]}
    )
    for g in gradients
  ]
  np.testing.assert_array_equal(after["pos_embed"], params["pos_embed"])
  expected = steps(plain, blocks, scaled)[-1]
  assert distance({"blocks": after["blocks"]}, expected) < 1e-6


# lbfgs needs the loss. rprop and sm3 do not accept a schedule.
@pytest.mark.parametrize("name", ["lbfgs", "rprop", "sm3"])
def test_optimizer_that_cannot_train_is_refused(name):
  with pytest.raises(SettingError, match=f"^name = '{name}': {name} cannot train: .+"):
    create_optimizer(name, optax.constant_schedule(0.1))


@pytest.mark.parametrize(
  "name", ["tree", "chain", "scale_by_learning_rate", "adam ", "", "linear_schedule"]
)
def test_name_in_optax_that_is_not_an_optimizer_is_refused(name):
  with pytest.raises(SettingError, match="accepted are adamw, adan, or an optimizer"):
    create_optimizer(name, 0.1)


def test_invalid_argument_value_is_refused():
  with pytest.raises(SettingError, match=r"^arguments = \{'momentum': 'high'\}: sgd"):
    create_optimizer("sgd", 0.1, arguments={"momentum": "high"})


def test_optimizer_arguments_are_settings():
  config = tiny_config(
    **{"optimizer.name": "sgd", "optimizer.arguments": {"momentum": 0.9}}
  )
  settings = Settings.from_config(config)
  assert settings.optimizer.arguments == {"momentum": 0.9}
  assert Settings.from_dict(settings.to_dict()) == settings
  state = build(settings).optimizer.init(random_params())
  assert len(jax.tree.leaves(state)) == 3  # Momentum of two arrays, and the step.


def test_error_names_an_unknown_argument_as_a_setting():
  config = tiny_config(
    **{"optimizer.name": "sgd", "optimizer.arguments": {"momentun": 0.9}}
  )
  with pytest.raises(
    SettingError,
    match=r"^config\.optimizer\.arguments\.momentun = 0\.9: is no setting of sgd",
  ):
    build(config)


# Schedules of 100 steps, with 0 or 20 steps of warmup.

PEAK = 0.3
SCHEDULE_VALUES = [
  ("constant", 0, {0: 1, 50: 1, 100: 1}),
  ("linear", 0, {0: 1, 25: 0.75, 100: 0}),
  ("cosine", 0, {0: 1, 25: (1 + np.sqrt(0.5)) / 2, 50: 0.5, 100: 0}),
  ("constant", 20, {0: 0, 5: 0.25, 20: 1, 21: 1, 100: 1}),
  ("linear", 20, {0: 0, 5: 0.25, 20: 1, 40: 0.75, 100: 0}),
  ("cosine", 20, {0: 0, 5: 0.25, 20: 1, 60: 0.5, 100: 0}),
]


@pytest.mark.parametrize(
  ("name", "warmup_steps", "step", "share"),
  [
    (name, warmup_steps, step, share)
    for name, warmup_steps, values in SCHEDULE_VALUES
    for step, share in values.items()
  ],
)
def test_schedules_rise_to_the_peak_and_anneal_to_zero(name, warmup_steps, step, share):
  schedule = learning_rate_schedule(name, PEAK, 100, warmup_steps)
  np.testing.assert_allclose(schedule(jnp.array(step)), share * PEAK, atol=1e-7)
