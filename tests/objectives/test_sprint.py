"""The objective of SPRINT: agreement with the released losses, and its settings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model, create_objective, create_process
from mdt_jax.diffusion.guidance import Guidance
from mdt_jax.diffusion.samplers import Sampler, sample
from mdt_jax.experiment import build
from mdt_jax.models import flops
from mdt_jax.objectives import UnmaskedPhase
from mdt_jax.objectives.objective import Draws
from mdt_jax.objectives.unmasked_phase import UNMASKED
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch
from tests import reference
from tests.models import test_sprint
from tests.objectives import several_devices
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

RECORDED = test_sprint.RECORDED
NULL = test_sprint.NUM_CLASSES
FLOW = create_process("flow", data_time=0, time_distribution="logit_normal")
TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)
SCALE = float(RECORDED["cfg/scale"])
images = test_sprint.images


def is_dropped(name):
  return RECORDED[f"{name}_noise"] < RECORDED[f"{name}_prob"]


def make_draws(t):
  """Draws of the recorded pass."""
  y = jnp.where(is_dropped("label_drop"), NULL, RECORDED["y"])
  return Draws(
    x0=images("images"),
    t=jnp.asarray(t),
    weights=jnp.ones(len(t)),
    noise=images("noise")[:, None],
    y=y[:, None],
    mask_noise=test_sprint.raster("loss_mask_noise"),
    path_drop=jnp.asarray(is_dropped("path_drop")),
  )


@functools.cache
def differentiated(ratio):
  """Compiled (parameters, draws) -> ((loss, losses), gradients)."""
  model, _ = test_sprint.load_model()
  settings = {"model": model, "process": FLOW, "ratio": ratio}
  objective = create_objective("sprint", **settings)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, draws):
    return objective.loss(model.apply, params, draws, objective.largest_static)

  return run


@functools.cache
def recorded_pass(ratio=0.75, time="logit_normal"):
  """((loss, losses), gradients with the names of the release)."""
  model, params = test_sprint.load_model()
  t = jax.nn.sigmoid(RECORDED["t_normal"])
  draws = make_draws(t if time == "logit_normal" else RECORDED["uniform/t"])
  found, gradients = differentiated(ratio)(params, draws)
  return found, to_torch(attributes_of(model), gradients)


@pytest.mark.parametrize(
  ("ratio", "time", "key"),
  [
    (0.75, "logit_normal", "loss"),
    (0.0, "logit_normal", "loss_all_tokens"),
    (0.75, "uniform", "uniform/loss"),
  ],
)
def test_loss_matches_reference(ratio, time, key):
  (loss, _), _ = recorded_pass(ratio, time)
  reference.assert_matches("SPRINT, losses", loss, RECORDED[key], 2e-5)


@pytest.mark.parametrize(
  ("key", "num_keep"), [("velocity", 9), ("velocity_all_tokens", None)]
)
def test_velocity_of_the_loss_matches_reference(key, num_keep):
  model, params = test_sprint.load_model()
  t = jax.nn.sigmoid(RECORDED["t_normal"])
  draws = make_draws(t)
  mask = None
  if num_keep is not None:
    mask = model.token_mask(draws.mask_noise, num_keep)
  x_t = FLOW.q_sample(draws.x0, t, draws.noise[:, 0])
  velocity = jax.jit(model.apply)(
    {"params": params}, x_t, t, draws.y[:, 0], mask, path_drop=draws.path_drop
  )
  reference.assert_matches(
    "SPRINT, velocities of the losses",
    reference.to_nchw(velocity),
    RECORDED[key],
    reference.FORWARD_TOLERANCE,
  )


@pytest.mark.parametrize("key", [key for key in RECORDED if key.startswith("grad/")])
def test_gradient_matches_reference(key):
  reference.assert_matches(
    "SPRINT, gradient of every parameter",
    recorded_pass()[1][key.removeprefix("grad/")],
    RECORDED[key],
    reference.GRADIENT_TOLERANCE,
  )


def test_every_trained_parameter_has_a_recorded_gradient():
  recorded = {key.removeprefix("grad/") for key in RECORDED if key.startswith("grad/")}
  assert recorded | {"mask_token"} == set(recorded_pass()[1])
  assert test_sprint.load_model()[0].frozen == ("mask_token",)


INTERVAL = tuple(float(RECORDED[f"sample/guidance_{end}"]) for end in ("low", "high"))


@pytest.mark.parametrize(
  ("kind", "guidance"),
  [
    ("ode_unguided", {"scale": 1.0}),
    ("ode_cfg", {}),
    ("ode_cfg_interval", {"interval": INTERVAL}),
    ("ode_pdg", None),
    ("sde_cfg", {}),
    ("sde_pdg", None),
  ],
)
def test_samples_match_reference(kind, guidance):
  """The SDE with D = sigma and a last step of the drift is that of the release."""
  y = jnp.asarray(RECORDED["y"])
  options = {"scale": SCALE, "num_timesteps": 1, **(guidance or {})}
  guide = Guidance(power=0.0, channels=None, **options)
  model_fn = test_sprint.path_drop_guided(y, SCALE)
  if guidance is not None:
    model_fn = guide.apply(test_sprint.network, y, jnp.full_like(y, NULL))
  name = kind[:3]
  noise = images("sample/sde_noise") if name == "sde" else None
  method = {"ode": "ode_euler", "sde": "sde"}[name]
  steps = int(RECORDED[f"sample/{name}_steps"])
  sampler = Sampler.create(FLOW, guide, method=method, num_steps=steps)
  options = dict(method=method, arguments=sampler.arguments, noise=noise)
  loop = jax.jit(
    lambda x: sample(model_fn, sampler.process, x, jax.random.key(0), **options)
  )
  found = reference.to_nchw(loop(images("sample/z")))
  what = f"SPRINT, samples by {method}"
  expected = RECORDED[f"sample/{kind}"]
  reference.assert_matches(what, found, expected, reference.LOOP_TOLERANCE)


# Properties.


def make_objective(network="SPRINT-S/2", process="gaussian", name="sprint", **settings):
  arguments = {"variance": "fixed_large"} if process == "gaussian" else {}
  sizes = {**TINY, "depth": 6}
  learn_sigma = {} if network.startswith("SPRINT") else {"learn_sigma": False}
  model = create_model(network, **sizes, **learn_sigma)
  process = create_process(process, **arguments)
  return create_objective(name, model=model, process=process, **settings)


def draw(objective, seed=0):
  return objective.draw(jax.random.key(seed), make_batch(tiny_config()))


def test_ratio_zero_gives_the_loss_of_the_unmasked_pass():
  objective = make_objective(process="flow", ratio=0.0, path_drop=0.0)
  plain = make_objective(process="flow", name="plain")
  params = reference.random_params(objective.model)
  losses = []
  for one in (objective, plain):
    draws, (static,) = draw(one), one.static_choices
    run = jax.jit(lambda p, o=one, d=draws, s=static: o.loss(o.model.apply, p, d, s))
    losses.append(run(params))
  jax.tree.map(np.testing.assert_array_equal, *losses)


@pytest.mark.parametrize("process", ["gaussian", "edm"])
def test_other_processes_train(process):
  objective = make_objective(process=process)
  params = reference.random_params(objective.model)
  draws = draw(objective)
  gradient = jax.jit(
    jax.grad(lambda p: objective.loss(objective.model.apply, p, draws, 4)[0])
  )(params)
  for leaf in jax.tree.leaves(gradient):
    assert np.isfinite(leaf).all() and leaf.any()


def test_other_draws_are_those_of_other_objectives():
  objective, plain = make_objective(), make_objective(name="plain")
  found, expected = draw(objective), draw(plain)
  assert expected.path_drop is None
  assert found.path_drop.dtype == bool and found.path_drop.shape == found.t.shape
  rest = found.replace(path_drop=None)
  jax.tree.map(np.testing.assert_array_equal, rest, expected)


def test_paths_are_dropped_with_the_given_probability():
  objective = make_objective(path_drop=0.3)
  dropped = np.stack([draw(objective, seed).path_drop for seed in range(100)])
  assert dropped.mean() == pytest.approx(0.3, abs=4 * (0.21 / dropped.size) ** 0.5)
  assert not draw(make_objective(path_drop=0.0)).path_drop.any()


@pytest.mark.parametrize("static", [4, UNMASKED])
def test_both_phases_drop_paths(static):
  objective = make_objective(path_drop=0.5)
  phases = UnmaskedPhase(objective, 10)
  model, params = objective.model, reference.random_params(objective.model)
  draws = draw(objective)
  drops = draws.path_drop
  assert drops.any() and not drops.all()

  @jax.jit
  def losses(draws):
    return phases.loss(model.apply, params, draws, static)[1]["loss"]

  found, without = losses(draws), losses(draws.replace(path_drop=None))
  np.testing.assert_array_equal(found != without, drops)


def test_default_ratio_keeps_a_quarter_of_the_tokens():
  objective = make_objective()
  assert objective.static_choices == (4,)
  assert "4 of 16" in objective.summary
  assert objective.flops(4) == 3 * flops.forward_flops(objective.model, 4)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "all", True])
@pytest.mark.parametrize("setting", ["ratio", "path_drop"])
def test_share_out_of_range_is_refused(setting, value):
  with pytest.raises(SettingError) as error:
    make_objective(**{setting: value})
  assert error.value.setting == setting


@pytest.mark.parametrize("network", ["DiT-S/2", "MDT-S/2", "TREAD-S/2"])
def test_network_without_a_deep_path_is_refused(network):
  with pytest.raises(SettingError) as error:
    make_objective(network)
  assert (error.value.setting, error.value.value) == ("objective", "sprint")
  assert "has no deep path" in error.value.accepted


@pytest.mark.parametrize("name", ["mdt", "mdt_unmasked"])
def test_objectives_of_mdt_refuse_sprint(name):
  with pytest.raises(SettingError, match="accepted is plain or sprint") as error:
    make_objective(name=name)
  assert error.value.setting == "objective"


def tiny_sprint(**settings):
  sizes = {"model.name": "SPRINT-S/2", "model.depth": 6, "diffusion.process": "flow"}
  return tiny_config(**sizes, **{"sampling.method": "ode_euler"}, **settings)


@pytest.mark.parametrize("name", [None, "sprint"])
def test_config_chooses_the_objective_and_its_settings(name):
  config = tiny_sprint(**{"objective.name": name, "num_steps": 8})
  config.objective.arguments = {"ratio": 0.5, "path_drop": 0.2}
  config.objective.unmasked_from = 6
  config.model.encoder_depth, config.model.mask_type = 1, "random"
  experiment = build(config)
  assert experiment.objective.static_choices == [8, UNMASKED]
  model = experiment.model
  assert (model.encoder_depth, model.middle_depth, model.decode_depth) == (1, 3, 2)
  assert model.mask_type == "random"


def test_gradients_do_not_depend_on_the_number_of_devices(tmp_path):
  several_devices.assert_gradients_agree(tmp_path, tiny_sprint(batch_size=16), 4)
