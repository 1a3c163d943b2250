"""The objective of TREAD: agreement with the released losses, and its settings."""

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
from mdt_jax.objectives.objective import Draws
from mdt_jax.pretrained.torch_mdt import to_torch
from tests import reference
from tests.models import test_tread
from tests.objectives import several_devices
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

RECORDED = test_tread.RECORDED
RATIO = test_tread.ROUTE["selection_ratio"]
KEPT = 22  # of 36 tokens
NULL = test_tread.NUM_CLASSES
TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)
images = test_tread.images


def make_draws(t, noise, y, mask_noise):
  """Draws of one pass."""
  return Draws(
    x0=images("images"),
    t=jnp.asarray(t),
    weights=jnp.ones(len(t)),
    noise=noise[:, None],
    y=jnp.asarray(y)[:, None],
    mask_noise=jnp.asarray(mask_noise),
  )


def loss_of(process, draws, ratio=RATIO):
  """((loss, losses), gradients with the names of the release)."""
  model, params = test_tread.load_model()
  objective = create_objective("tread", model=model, process=process, ratio=ratio)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    return objective.loss(model.apply, params, draws, objective.largest_static)

  found, gradients = run(params)
  attributes = {name: getattr(model, name) for name in ("depth", "learn_sigma", *TINY)}
  return found, to_torch({**attributes, "variant": "TREAD"}, gradients)


@functools.cache
def edm(ratio=RATIO):
  process = create_process("edm")
  t = process.p_mean + process.p_std * RECORDED["edm/sigma_normal"].ravel()
  is_dropped = RECORDED["edm/label_drop_noise"] < RECORDED["edm/class_drop_prob"]
  y = np.where(is_dropped, NULL, RECORDED["y"])
  draws = make_draws(t, images("edm/noise"), y, RECORDED["edm/route_noise"])
  return loss_of(process, draws, ratio)


@pytest.mark.parametrize(("ratio", "key"), [(RATIO, "loss"), (0.0, "loss_all_tokens")])
def test_edm_loss_matches_reference(ratio, key):
  (loss, _), _ = edm(ratio)
  expected = RECORDED[f"edm/{key}"]
  reference.assert_matches("TREAD, loss of EDM", loss, expected, 2e-5)


@pytest.mark.parametrize("key", [key for key in RECORDED if key.startswith("grad/")])
def test_gradient_matches_reference(key):
  reference.assert_matches(
    "TREAD, gradient of every parameter",
    edm()[1][key.removeprefix("grad/")],
    RECORDED[key],
    reference.GRADIENT_TOLERANCE,
  )


def test_every_trained_parameter_has_a_recorded_gradient():
  recorded = {key.removeprefix("grad/") for key in RECORDED if key.startswith("grad/")}
  assert recorded | {"pos_embed"} == set(edm()[1])
  assert test_tread.load_model()[0].frozen == ("pos_embed",)


FLOW = create_process("flow", data_time=0, time_distribution="logit_normal")


def test_losses_of_a_rectified_flow_match_reference():
  t = jax.nn.sigmoid(RECORDED["rf/t_normal"])
  noise, mask_noise = images("rf/noise_z1"), RECORDED["rf/route_noise"]
  (_, losses), _ = loss_of(FLOW, make_draws(t, noise, RECORDED["y"], mask_noise))
  expected = RECORDED["rf/loss_per_sample"]
  reference.assert_matches("TREAD, losses of a flow", losses["loss"], expected, 2e-5)


SCALE = float(RECORDED["cfg/scale"])


@pytest.mark.parametrize(
  ("process", "method", "scale", "start", "key"),
  [
    (FLOW, "ode_euler", SCALE, "rf/z", "rf/sample_cfg"),
    (create_process("edm"), "edm", 1.0, "heun/latents", "heun/out"),
    (create_process("edm"), "heun", 1.0, "heun/latents", "heun/out"),
    (create_process("edm"), "edm", SCALE, "heun/latents", "heun/out_cfg"),
  ],
)
def test_samples_match_reference(process, method, scale, start, key):
  model, params = test_tread.load_model()
  steps = int(RECORDED["rf/steps" if process is FLOW else "heun/steps"])
  guidance = Guidance(scale=scale, power=0.0, channels=None)
  sampler = Sampler.create(process, guidance, method=method, num_steps=steps)

  def network(x, t, y):
    return model.apply({"params": params}, x, t, y)

  y = jnp.asarray(RECORDED["y"])
  model_fn = guidance.apply(network, y, jnp.full_like(y, NULL))
  x = images(start) * process.noise_scale
  arguments = dict(method=method, arguments=sampler.arguments)
  loop = jax.jit(
    lambda x: sample(model_fn, sampler.process, x, jax.random.key(0), **arguments)
  )
  found = reference.to_nchw(loop(x))
  what = f"TREAD, samples by {method}"
  reference.assert_matches(what, found, RECORDED[key], reference.LOOP_TOLERANCE)


# Properties.


def make_objective(network="TREAD-S/2", process="gaussian", name="tread", **settings):
  arguments = {"variance": "fixed_large"} if process == "gaussian" else {}
  learn_sigma = {} if network.startswith("TREAD") else {"learn_sigma": False}
  model = create_model(network, **TINY, depth=6, **learn_sigma)
  process = create_process(process, **arguments)
  return create_objective(name, model=model, process=process, **settings)


@pytest.mark.parametrize("process", ["gaussian", "flow", "edm"])
def test_ratio_zero_gives_the_loss_of_dit(process):
  routed = make_objective(process=process, ratio=0.0)
  plain = make_objective("DiT-S/2", process, "plain")
  params = reference.random_params(routed.model)
  batch = make_batch(tiny_config())
  losses = []
  for objective in (routed, plain):
    draws = objective.draw(jax.random.key(0), batch)
    (static,) = objective.static_choices
    run = jax.jit(
      lambda p, o=objective, d=draws, s=static: o.loss(o.model.apply, p, d, s)
    )
    losses.append(run(params))
  jax.tree.map(np.testing.assert_array_equal, *losses)


@pytest.mark.parametrize("process", ["gaussian", "flow", "edm"])
def test_every_process_trains_with_a_route(process):
  objective = make_objective(process=process)
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  gradient = jax.jit(
    jax.grad(lambda p: objective.loss(objective.model.apply, p, draws, 8)[0])
  )(params)
  blocks = jax.tree.leaves(gradient["blocks"])
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in blocks)


@pytest.mark.parametrize(
  ("ratio", "kept"), [(0.0, 16), (0.5, 8), (0.41, 10), (0.9, 2), (0.99, 1)]
)
def test_number_of_kept_tokens_is_the_released_one(ratio, kept):
  objective = make_objective(ratio=ratio)
  assert objective.static_choices == (kept,) == (16 - int(16 * ratio),)
  assert str(kept) in objective.summary


def test_step_costs_three_forward_passes_with_a_route():
  objective = make_objective()
  assert objective.flops(8) == 3 * flops.forward_flops(objective.model, 8)
  assert objective.flops(16) == 3 * flops.forward_flops(objective.model)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), "half", True])
def test_ratio_that_keeps_no_token_is_refused(ratio):
  with pytest.raises(SettingError) as error:
    make_objective(ratio=ratio)
  assert error.value.setting == "ratio"


@pytest.mark.parametrize("network", ["DiT-S/2", "MDT-S/2"])
def test_network_without_a_route_is_refused(network):
  with pytest.raises(SettingError) as error:
    make_objective(network)
  assert (error.value.setting, error.value.value) == ("objective", "tread")
  assert "has no route" in error.value.accepted


@pytest.mark.parametrize("name", ["mdt", "mdt_unmasked"])
def test_objectives_of_mdt_refuse_tread(name):
  with pytest.raises(SettingError, match="accepted is plain or tread") as error:
    make_objective(name=name)
  assert error.value.setting == "objective"


@pytest.mark.parametrize("name", [None, "tread"])
def test_config_chooses_the_objective_and_its_ratio(name):
  settings = {"model.name": "TREAD-S/2", "model.depth": 6, "diffusion.process": "edm"}
  settings |= {"sampling.method": "heun", "objective.name": name}
  config = tiny_config(**settings)
  config.objective.arguments = {"ratio": 0.75}
  config.model.route_start = config.model.route_end = 1
  experiment = build(config)
  assert experiment.objective.static_choices == (4,)
  assert experiment.model.route == range(1, 2)


def test_gradients_do_not_depend_on_the_number_of_devices(tmp_path):
  settings = {"model.name": "TREAD-S/2", "model.depth": 6, "batch_size": 16}
  settings |= {"diffusion.process": "edm", "sampling.method": "heun"}
  several_devices.assert_gradients_agree(tmp_path, tiny_config(**settings), 8)
