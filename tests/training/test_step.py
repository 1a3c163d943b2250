"""The training step: draws, losses, accumulation, averages."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.models.masking import token_mask_from_noise
from mdt_jax.objectives import PlainObjective
from mdt_jax.pretrained.tensors import flatten
from mdt_jax.train_state import TrainState
from mdt_jax.training import step
from mdt_jax.training.program import make_program
from tests import reference
from tests.training.tiny import tiny_config, tiny_dit_config

NUM_KEEP = 10
DIT = {"model.name": "DiT-S/2"}  # Compiles faster: one pass, fewer parameters.


def make_batch(config, seed=0):
  rng = np.random.default_rng(seed)
  shape = (config.batch_size, config.model.input_size, config.model.input_size, 1)
  return {
    "image": rng.uniform(-1, 1, shape).astype(np.float32),
    "label": rng.integers(0, 10, config.batch_size).astype(np.int32),
  }


def make_state(config):
  experiment = build(config)
  params = jax.tree.map(jnp.asarray, reference.random_params(experiment.model))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=experiment.optimizer.init(params),
    ema={str(decay): params for decay in config.ema_decays},
    loss_history=experiment.objective.timestep_sampler.init(),
    batch_offset=jnp.zeros((), jnp.int32),
  )


@functools.cache
def compiled_step(**settings):
  """The step of a config with these changes, compiled once for all tests."""
  return make_step(smooth_config(**settings))


def make_step(config):
  experiment = build(config)
  train_step = step.make_train_step(
    experiment.model,
    experiment.objective,
    experiment.optimizer,
    seed=config.seed,
    ema_decays=config.ema_decays,
    ema_warmup=config.ema_warmup,
    ema_every=config.ema_every,
    frozen=experiment.frozen,
    accumulation_steps=config.accumulation_steps,
    learning_rate=experiment.learning_rate,
  )
  return jax.jit(train_step, static_argnames="static")


def smooth_config(**settings):
  """A config with a large eps, so that rounding cannot change the sign of an update.

  The network is MDT: the smallest one with a masked pass.
  """
  changes = {"model.name": "MDT-S/2", "optimizer.eps": 1e-2}
  return tiny_config(**{**changes, **settings})


@functools.cache
def run_once(**settings):
  config = smooth_config(**settings)
  state = make_state(config)
  num_keep = None if config.model.name == "DiT-S/2" else NUM_KEEP
  return (state, *compiled_step(**settings)(state, make_batch(config), num_keep))


def distance(first, second):
  differences = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), first, second
  )
  return float(max(jax.tree.leaves(differences)))


def test_repeated_step_is_bit_equal():
  config = smooth_config(**DIT)
  state, after, _ = run_once(**DIT)
  again, _ = make_step(config)(state, make_batch(config), None)
  assert distance(after.params, again.params) == 0


def test_another_seed_gives_a_different_step():
  _, after, _ = run_once(**DIT)
  _, other, _ = run_once(seed=1, **DIT)
  assert distance(after.params, other.params) > 0


@pytest.mark.parametrize("parts", [4])
def test_gradient_accumulation_matches_the_whole_batch(parts):
  _, whole, whole_metrics = run_once()
  _, split, split_metrics = run_once(accumulation_steps=parts)
  assert distance(whole.params, split.params) < 2e-6
  assert distance(whole_metrics, split_metrics) < 1e-4


def test_step_matches_the_released_training_loop():
  """The loop is written out here: two passes, the sum of their losses, one update."""
  config = smooth_config()
  state, after, metrics = run_once()
  experiment = build(config)
  model, process = experiment.model, experiment.process
  draws = experiment.objective.draw(step.step_key(config.seed, 0), make_batch(config))

  def pass_loss(params, index, mask):
    noise = draws.noise[:, index]
    x_t = process.q_sample(draws.x0, draws.t, noise)
    t, y = process.network_time(draws.t), draws.y[:, index]
    output = model.apply({"params": params}, x_t, t, y, mask)
    return process.training_losses(output, draws.x0, x_t, draws.t, noise)["loss"].mean()

  def loss(params):
    mask = token_mask_from_noise(draws.mask_noise, NUM_KEEP)
    return pass_loss(params, 0, None) + pass_loss(params, 1, mask)

  @jax.jit
  def update(params):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, _ = experiment.optimizer.update(gradients, state.opt_state, params)
    return value, jax.tree.map(jnp.add, params, updates)

  value, expected = update(state.params)
  assert distance(after.params, expected) < 2e-6
  means = step.mean_metrics(metrics)
  np.testing.assert_allclose(means["loss"] + means["masked_loss"], value, rtol=1e-5)


def test_ema_follows_its_decays():
  config = tiny_config(ema_decays=(0.5, 0.9), **DIT)
  state = make_state(config)
  after, _ = make_step(config)(state, make_batch(config), None)
  for decay in config.ema_decays:
    expected = jax.tree.map(
      lambda old, new, d=decay: d * np.asarray(old) + (1 - d) * np.asarray(new),
      state.ema[str(decay)],
      after.params,
    )
    assert distance(after.ema[str(decay)], expected) < 1e-6


def test_ema_warmup_limits_the_decay_and_frozen_parameters_stay():
  """Step n = 3 has the decay 4 / 13."""
  frozen = {"optimizer.frozen": "few_shot", "optimizer.clip_norm": 0.0}
  config = tiny_config(ema_decays=(0.1, 0.9999), ema_warmup=True, **DIT, **frozen)
  state = make_state(config)
  state = state.replace(step=state.step + 3)
  after, _ = make_step(config)(state, make_batch(config), None)
  for decay, expected in ((0.1, 0.1), (0.9999, 4 / 13)):
    average = jax.tree.map(
      lambda old, new, d=expected: d * np.asarray(old) + (1 - d) * np.asarray(new),
      state.ema[str(decay)],
      after.params,
    )
    assert distance(after.ema[str(decay)], average) < 1e-6
  moved = {
    path
    for path, old in flatten(state.params).items()
    if np.any(flatten(after.params)[path] != old)
  }
  assert moved == flatten(state.params).keys() - build(config).frozen


def test_averages_change_every_few_steps_only():
  config = smooth_config(ema_decays=(0.9,), ema_every=3, **DIT)
  first, step, batch = make_state(config), make_step(config), make_batch(config)
  states = [first]
  for _ in range(3):
    states.append(step(states[-1], batch, None)[0])
  assert distance(states[2].ema, first.ema) == 0
  expected = jax.tree.map(
    lambda old, new: 0.9**3 * np.asarray(old) + (1 - 0.9**3) * np.asarray(new),
    first.ema["0.9"],
    states[3].params,
  )
  assert distance(states[3].ema["0.9"], expected) < 1e-6
  assert distance(states[3].ema, first.ema) > 0


def test_averages_of_every_few_steps_need_no_memory():
  """Products with the parameters before the loop would take as much as these."""
  sizes = []
  for every in (1, 3):
    settings = dict(ema_decays=(0.9, 0.99), ema_every=every, **DIT)
    config = smooth_config(**settings)
    state = make_state(config)
    lowered = compiled_step(**settings).lower(state, make_batch(config), None)
    sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
  params = sum(x.nbytes for x in jax.tree.leaves(state.params))
  assert sizes[1] < sizes[0] + params / 2


def test_averages_of_frozen_parameters_stay_too():
  """Averaged as the others are, they would move by rounding at each step."""
  frozen = {"optimizer.frozen": "few_shot"}
  config = tiny_config(ema_decays=(0.9, 0.9999), **DIT, **frozen)
  state, step = make_state(config), make_step(config)
  first = flatten(state.params)
  for _ in range(3):
    state, _ = step(state, make_batch(config), None)
  for average in state.ema.values():
    for path in build(config).frozen:
      np.testing.assert_array_equal(flatten(average)[path], first[path])
    assert np.any(flatten(average)["label_embed/table"] != first["label_embed/table"])


def test_mask_ratio_zero_has_no_masked_loss_or_side_block_update():
  config = tiny_config(
    **{"optimizer.name": "adamw", "masking.ratio": 0.0, "masking.width": 0.0}
  )
  state = make_state(config)
  after, metrics = make_step(config)(state, make_batch(config), None)
  assert "masked_loss" not in metrics
  assert distance(after.params["side_block"], state.params["side_block"]) == 0


def test_dit_positions_stay_frozen_under_weight_decay():
  config = tiny_config(**DIT, **{"optimizer.weight_decay": 0.1})
  state = make_state(config)
  after, _ = make_step(config)(state, make_batch(config), None)
  assert distance(after.params["pos_embed"], state.params["pos_embed"]) == 0
  assert distance(after.params["blocks"], state.params["blocks"]) > 0


def test_quartiles_average_to_the_loss():
  _, _, metrics = run_once()
  total = sum(metrics[f"loss_q{q}"] for q in range(4))
  np.testing.assert_allclose(total, metrics["loss"], rtol=1e-5)


def test_quartile_without_samples_is_omitted():
  metrics = {"loss_q0": jnp.array([0.0, 0.0]), "loss_q1": jnp.array([3.0, 2.0])}
  assert step.mean_metrics(metrics) == {"loss_q1": 1.5}


def test_added_metrics_give_the_mean_over_samples():
  first, second = {"loss": jnp.array([2.0, 1.0])}, {"loss": jnp.array([1.0, 2.0])}
  assert step.mean_metrics(step.add_metrics(first, second)) == {"loss": 1.0}


def test_metrics_of_different_losses_are_added():
  """An MDT has no masked loss in its unmasked phase."""
  first = {"loss": jnp.array([1.0, 1.0]), "masked_loss": jnp.array([4.0, 2.0])}
  second = {"loss": jnp.array([3.0, 1.0])}
  expected = {"loss": 2.0, "masked_loss": 2.0}
  assert step.mean_metrics(step.add_metrics(first, second)) == expected
  assert step.mean_metrics(step.add_metrics(second, first)) == expected


def test_loss_second_moment_sampler_learns_from_the_step():
  config = tiny_config(timestep_sampler="loss-second-moment", **DIT)
  state = make_state(config)
  after, _ = make_step(config)(state, make_batch(config), None)
  assert int(after.loss_history.counts.sum()) == config.batch_size


def test_timestep_weights_scale_the_loss_but_not_the_history():
  """Otherwise, the sampler would learn from its own weights."""
  config = tiny_config(timestep_sampler="loss-second-moment", **DIT)
  experiment = build(config)
  objective = experiment.objective
  rng = np.random.default_rng(0)
  num_timesteps = config.diffusion.num_timesteps
  history = objective.timestep_sampler.init().replace(
    losses=rng.uniform(0.1, 2, (num_timesteps, 10)).astype(np.float32),
    counts=np.full(num_timesteps, 10, np.int32),
  )
  state = make_state(config).replace(loss_history=history)
  after, metrics = make_step(config)(state, make_batch(config), None)
  key = step.step_key(config.seed, 0)
  draws = objective.draw(key, make_batch(config), history)
  assert np.std(draws.weights) > 0.1
  apply = experiment.model.apply
  _, found = jax.jit(lambda p: objective.loss(apply, p, draws, None))(state.params)
  losses = found["total"]
  mean = step.mean_metrics(metrics)["loss"]
  np.testing.assert_allclose(mean, np.mean(losses * draws.weights), rtol=1e-4)
  changed = np.asarray(after.loss_history.losses) != history.losses
  recorded = np.sort(np.asarray(after.loss_history.losses)[changed])
  np.testing.assert_allclose(recorded, np.sort(losses), rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_step_changes_only_the_step_number(value):
  config = smooth_config()
  state = make_state(config)
  batch = make_batch(config)
  batch["image"][3, 0, 0] = value
  after, metrics = compiled_step()(state, batch, NUM_KEEP)
  assert after.step == state.step + 1
  for old, new in zip(
    jax.tree.leaves(state.replace(step=None)),
    jax.tree.leaves(after.replace(step=None)),
    strict=True,
  ):
    assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
  # The logs get only the count of skipped steps.
  assert step.mean_metrics(metrics) == {"skipped": 1.0}


@pytest.mark.parametrize("finite", [True, False])
def test_choice_and_branch_give_the_same_state(finite):
  """The step uses one of them on CPUs and TPUs, and the other on GPUs."""
  state = make_state(smooth_config(**DIT))

  def update(state):
    change = 1.0 if finite else jnp.nan
    return state.replace(params=jax.tree.map(lambda x: x + change, state.params))

  expected = update(state) if finite else state
  for function in (step._branch, step._choose):
    found = jax.jit(lambda s, f=function: f(jnp.bool_(finite), update, s))(state)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gpus_choose_and_others_branch():
  config = smooth_config(**DIT)
  traced = compiled_step(**DIT).trace(make_state(config), make_batch(config), None)

  def count(platform):
    lowered = traced.lower(lowering_platforms=(platform,))
    return lowered.as_text().count("stablehlo.case")

  # Gradients of products have branches too, chosen when the step is lowered.
  assert count("cpu") == count("tpu") == count("cuda") + 1


def test_finite_step_is_not_skipped():
  state, after, metrics = run_once()
  assert step.mean_metrics(metrics)["skipped"] == 0
  assert distance(state.params, after.params) > 0


@pytest.mark.parametrize(
  "output",
  [
    lambda total: total.mean(),
    lambda total: (total.mean(), {}),
    lambda total: (total.mean(), {"loss": total}),
    lambda total: (total, {"total": total}),
    lambda total: (total.mean(), {"total": total.mean()}),
  ],
  ids=["no parts", "empty", "no total", "loss of each sample", "mean total"],
)
def test_objective_that_returns_anything_else_is_refused(output):
  class Own(PlainObjective):
    def loss(self, apply, params, draws, static):
      return output(super().loss(apply, params, draws, static)[1]["total"])

  config = tiny_dit_config()
  experiment = build(config, objective=Own)
  program = make_program(experiment)
  batch = jax.tree.map(jnp.asarray, make_batch(config))
  with pytest.raises(SettingError) as error:
    jax.eval_shape(program.step, program.state, batch, None)
  assert (error.value.setting, error.value.value) == ("objective", "Own")
  assert '"total": (B,)' in error.value.accepted
