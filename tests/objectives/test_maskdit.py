"""The objective of MaskDiT: agreement with the released losses, and its settings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model, create_objective, create_process
from mdt_jax.experiment import build
from mdt_jax.models import flops
from mdt_jax.objectives.objective import Draws
from mdt_jax.objectives.tokens import scheduled_ratio
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch
from tests import reference
from tests.models import test_maskdit
from tests.objectives import several_devices
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

RECORDED = test_maskdit.RECORDED
images = test_maskdit.images
SMALL = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)
DECODER = dict(decode_depth=2, decoder_hidden_size=8, decoder_num_heads=2)


def recorded_draws():
  process = test_maskdit.EDM
  t = process.p_mean + process.p_std * RECORDED["loss/rnd_normal"].ravel()
  is_dropped = RECORDED["loss/drop_u"].ravel() < 0.1
  y = np.where(is_dropped, test_maskdit.NUM_CLASSES, RECORDED["loss/labels_int"])
  np.testing.assert_array_equal(y, test_maskdit.labels("loss/y_onehot"))
  return Draws(
    x0=images("loss/images"),
    t=jnp.asarray(t),
    weights=jnp.ones(len(t)),
    noise=images("loss/unit_noise")[:, None],
    y=jnp.asarray(y)[:, None],
    mask_noise=jnp.asarray(RECORDED["loss/mask_noise"]),
  )


@functools.cache
def recorded_step(unmasked=False, **settings):
  """((loss, losses), gradients with the names of the release)."""
  model, params = test_maskdit.load_model()
  objective = create_objective(
    "maskdit", model=model, process=test_maskdit.EDM, **settings
  )
  draws = recorded_draws()

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params):
    if unmasked:
      return objective.unmasked_loss(model.apply, params, draws)
    return objective.loss(model.apply, params, draws, objective.largest_static)

  found, gradients = run(params)
  return found, to_torch(attributes_of(model), gradients)


def test_defaults_are_the_released_settings():
  objective = make_objective()
  assert objective.mae_weight == RECORDED["loss/mae_loss_coef"] == 0.1
  assert objective.static_choices == (8,)
  assert RECORDED["loss/mask_ratio"] == 0.5


@pytest.mark.parametrize(
  ("name", "key"),
  [("loss", "edm_term"), ("reconstruction", "mae_term"), ("total", "total")],
)
def test_losses_match_reference(name, key):
  (_, losses), _ = recorded_step()
  expected = RECORDED[f"loss/{key}"]
  reference.assert_matches("MaskDiT, losses", losses[name], expected, 2e-5)


def test_loss_matches_reference():
  (loss, _), _ = recorded_step()
  reference.assert_matches("MaskDiT, losses", loss, RECORDED["loss"], 2e-5)


GRADIENTS = [key for key in RECORDED if key.startswith("grad/")]


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradient_matches_reference(key):
  reference.assert_matches(
    "MaskDiT, gradient of every parameter",
    recorded_step()[1][key.removeprefix("grad/model.")],
    RECORDED[key],
    reference.GRADIENT_TOLERANCE,
  )


def test_every_parameter_has_a_recorded_gradient():
  assert {key.removeprefix("grad/model.") for key in GRADIENTS} == set(
    recorded_step()[1]
  )
  model, _ = test_maskdit.load_model()
  assert model.frozen == ("pos_embed", "decode_pos_embed")


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"unmasked": True}])
def test_unmasked_losses_match_reference(settings):
  (_, losses), _ = recorded_step(**settings)
  expected = RECORDED["loss_unmasked/total"]
  what = "MaskDiT, losses without a mask"
  reference.assert_matches(what, losses["total"], expected, 2e-5)


@pytest.mark.parametrize(
  "key", [key for key in RECORDED if key.startswith("loss_unmasked/grad/")]
)
def test_unmasked_gradient_matches_reference(key):
  """In float64, all are within 1.4e-5; float32 rounds the embedding of the time."""
  reference.assert_matches(
    "MaskDiT, gradients without a mask",
    recorded_step(ratio=0.0)[1][key.removeprefix("loss_unmasked/grad/model.")],
    RECORDED[key],
    2e-4,
  )


SCHEDULES = [key.split("/")[1:] for key in RECORDED if key.startswith("ratio/")]
SCHEDULES = [key for key in SCHEDULES if len(key) == 2]


@pytest.mark.parametrize(("name", "range_"), SCHEDULES)
def test_scheduled_ratio_matches_reference(name, range_):
  ratio, min_ratio = (float(n.replace("p", ".")) for n in range_.split("_"))
  found = [
    scheduled_ratio(name, float(progress), ratio, min_ratio)
    for progress in RECORDED["ratio/progress"]
  ]
  expected = RECORDED[f"ratio/{name}/{range_}"]
  reference.assert_matches("MaskDiT, schedules of the ratio", found, expected, 1e-12)


def test_all_schedules_are_recorded():
  assert len(SCHEDULES) == 16


# Properties.


@functools.cache
def make_objective(network="MaskDiT-S/2", process="edm", name="maskdit", **settings):
  arguments = {}
  if process == "gaussian":
    arguments = {"variance": settings.pop("variance", "fixed_large")}
    arguments["prediction"] = settings.pop("prediction", "v")
  elif "prediction" in settings:
    arguments = {"prediction": settings.pop("prediction")}
  process = create_process(process, **arguments)
  sizes = {"depth": 4, "decode_depth": 2, "learn_sigma": process.learns_variance}
  if network.startswith("MaskDiT"):
    sizes |= DECODER
  model = create_model(network, **SMALL, **sizes, patch_size=2)
  return create_objective(name, model=model, process=process, **settings)


def gradients_of(objective):
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  static = objective.largest_static
  run = jax.grad(
    lambda p: objective.loss(objective.model.apply, p, draws, static), has_aux=True
  )
  return jax.jit(run)(params)


PROCESSES = [
  {"process": "edm"},
  {"process": "flow"},
  {"process": "flow", "prediction": "x0"},
  {"process": "gaussian", "prediction": "v"},
  {"process": "gaussian", "prediction": "x0"},
]


@pytest.mark.parametrize("settings", [PROCESSES[i] for i in (0, 1, 3)])
def test_every_process_trains_every_parameter(settings):
  gradients, losses = gradients_of(make_objective(**settings))
  leaves = jax.tree.leaves(gradients)
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)
  np.testing.assert_allclose(
    losses["total"], losses["loss"] + 0.1 * losses["reconstruction"], rtol=1e-6
  )


def test_network_with_a_side_interpolater_trains():
  gradients, losses = gradients_of(make_objective("MDT-S/2"))
  assert gradients["side_block"]["fc1"]["kernel"].any()
  assert np.isfinite(losses["reconstruction"]).all()


def test_objective_mdt_trains_a_maskdit():
  gradients, losses = gradients_of(make_objective(name="mdt", width=0.0))
  assert np.isfinite(losses["total"]).all()
  assert gradients["mask_token"].any()


def test_two_unmasked_passes_are_accepted():
  assert make_objective(name="mdt_unmasked").summary == "two unmasked passes"


# The losses of a step as functions of the output of the network.


def draws_of(objective):
  """Draws of a step, and the mask that keeps half of the tokens."""
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  return draws, objective.model.token_mask(draws.mask_noise, 8)


def losses_at(objective, output, draws, mask):
  return objective.token_losses(lambda *_: output, {}, draws, mask)


def random_output(objective, draws):
  rng = np.random.default_rng(0)
  shape = (*draws.x0.shape[:-1], objective.model.out_channels)
  return rng.standard_normal(shape).astype(np.float32)


def as_tokens(x):
  """(B, 8, 8, C) -> (B, 16, 4 C): patches of 2x2 pixels."""
  cut = np.asarray(x).reshape(len(x), 4, 2, 4, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  return cut.reshape(len(x), 16, -1)


@pytest.mark.parametrize("settings", PROCESSES)
def test_terms_train_the_tokens_that_they_name(settings):
  objective = make_objective(**settings)
  draws, mask = draws_of(objective)
  output, removed = random_output(objective, draws), np.asarray(mask.removed)
  for name, trained in (("loss", ~removed), ("reconstruction", removed)):
    gradient = jax.grad(
      lambda output, n=name: losses_at(objective, output, draws, mask)[n].sum()
    )(output)
    assert (as_tokens(gradient).any(-1) == trained).all()
    assert np.isfinite(gradient).all()


def test_learned_variance_of_kept_tokens_is_trained():
  objective = make_objective(process="gaussian", variance="learned_range")
  draws, mask = draws_of(objective)
  output = random_output(objective, draws)
  gradient = jax.grad(
    lambda output: losses_at(objective, output, draws, mask)["total"].sum()
  )(output)
  mean, variance = np.split(np.asarray(gradient), 2, axis=-1)
  assert as_tokens(mean).any(-1).all()
  assert (as_tokens(variance).any(-1) == ~np.asarray(mask.removed)).all()


@pytest.mark.parametrize("settings", PROCESSES)
def test_ratio_zero_gives_the_plain_loss(settings):
  found = []
  for options in ({"ratio": 0.0}, {"name": "plain"}):
    objective = make_objective(**settings, **options)
    draws, _ = draws_of(objective)
    output = random_output(objective, draws)
    static = objective.largest_static
    found.append(objective.loss(lambda *_, o=output: o, {}, draws, static))
  (loss, losses), plain = found
  np.testing.assert_array_equal(losses.pop("reconstruction"), 0)
  jax.tree.map(np.testing.assert_array_equal, (loss, losses), plain)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_every_step_of_a_run_logs_the_same_losses(weight):
  """With all tokens too: at the end of a schedule, and in the unmasked phase."""
  objective = make_objective(mae_weight=weight)
  draws, mask = draws_of(objective)
  output = random_output(objective, draws)
  names = [losses_at(objective, output, draws, m).keys() for m in (mask, None)]
  assert names[0] == names[1]


def test_each_term_is_the_mean_over_its_tokens():
  """By NumPy, from the definition: kept tokens denoise, removed ones reconstruct."""
  objective = make_objective()
  draws, mask = draws_of(objective)
  output = random_output(objective, draws)
  losses = losses_at(objective, output, draws, mask)
  sigma = np.exp(np.asarray(draws.t, np.float64))[:, None, None, None]
  x0, noise = np.asarray(draws.x0, np.float64), np.asarray(draws.noise[:, 0])
  noisy = x0 + sigma * noise
  denoised = 0.25 / (sigma**2 + 0.25) * noisy
  denoised += sigma * 0.5 / np.sqrt(sigma**2 + 0.25) * output

  removed = np.asarray(mask.removed)
  assert (removed.sum(1) == 8).all()
  weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
  denoising = as_tokens(weight * (denoised - x0) ** 2).mean(-1)
  target = as_tokens(noisy)
  variance = target.var(-1, ddof=1, keepdims=True)
  target = (target - target.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
  error = ((as_tokens(denoised) - target) ** 2).mean(-1)
  for i in range(len(removed)):
    expected = denoising[i, ~removed[i]].mean(), error[i, removed[i]].mean()
    found = losses["loss"][i], losses["reconstruction"][i]
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_target_of_a_flat_patch_is_zero():
  """The variance of its pixels is 0; eps stays."""
  objective = make_objective(process="flow")
  draws, mask = draws_of(objective)
  draws = draws.replace(t=jnp.zeros_like(draws.t), x0=jnp.ones_like(draws.x0))
  output = random_output(objective, draws)  # at t = 0, D is x_t = 1
  losses = losses_at(objective, output, draws, mask)
  np.testing.assert_allclose(losses["reconstruction"], 1, rtol=1e-5)


def test_losses_are_finite_without_data():
  """alpha is 0 at the end of a flow, where x_t / alpha would be infinite."""
  objective = make_objective(process="flow")
  draws, mask = draws_of(objective)
  draws = draws.replace(t=jnp.ones_like(draws.t))
  output = random_output(objective, draws)
  total, gradient = jax.value_and_grad(
    lambda output: losses_at(objective, output, draws, mask)["total"].sum()
  )(output)
  assert np.isfinite(total) and np.isfinite(gradient).all()


def test_weight_of_zero_switches_the_reconstruction_off():
  objective = make_objective(mae_weight=0.0)
  draws, mask = draws_of(objective)
  losses = losses_at(objective, random_output(objective, draws), draws, mask)
  assert "reconstruction" not in losses
  np.testing.assert_array_equal(losses["total"], losses["loss"])


def test_step_costs_three_masked_passes():
  objective = make_objective()
  assert objective.flops(8) == 3 * flops.forward_flops(objective.model, 8)
  assert flops.forward_flops(objective.model, 8) < flops.forward_flops(objective.model)


@pytest.mark.parametrize(
  ("process", "prediction"),
  [("gaussian", "epsilon"), ("flow", "epsilon"), ("flow", "score")],
)
def test_predictions_of_noise_have_no_reconstruction(process, prediction):
  with pytest.raises(SettingError) as error:
    make_objective(process=process, prediction=prediction)
  assert (error.value.setting, error.value.value) == ("mae_weight", 0.1)
  assert "accepted are edm, flow with velocity or x0" in error.value.accepted
  settings = dict(process=process, prediction=prediction, mae_weight=0.0)
  assert make_objective(**settings).static_choices == (8,)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "much", True])
def test_bad_weight_is_refused(weight):
  with pytest.raises(SettingError) as error:
    make_objective(mae_weight=weight)
  assert error.value.setting == "mae_weight"


def test_patch_of_one_number_is_refused():
  model = create_model("MaskDiT-S/2", input_size=8, patch_size=1, in_channels=1)
  options = dict(model=model, process=create_process("edm"))
  with pytest.raises(SettingError) as error:
    create_objective("maskdit", **options)
  assert error.value.setting == "mae_weight"
  create_objective("maskdit", **options, mae_weight=0.0)


@pytest.mark.parametrize("network", ["DiT-S/2", "SiT-S/2", "TREAD-S/2"])
def test_network_that_predicts_no_removed_tokens_is_refused(network):
  model = create_model(network, learn_sigma=False)
  with pytest.raises(SettingError) as error:
    create_objective("maskdit", model=model, process=create_process("edm"))
  assert (error.value.setting, error.value.value) == ("objective", "maskdit")
  assert "predicts no removed tokens" in error.value.accepted


def config_of(**settings):
  settings = {"model.name": "MaskDiT-S/2", "sampling.method": "edm", **settings}
  settings = {"diffusion.process": "edm", "model.depth": 2, **settings}
  return tiny_config(**settings | {f"model.{name}": n for name, n in DECODER.items()})


@pytest.mark.parametrize("name", [None, "maskdit"])
def test_config_chooses_the_objective_and_its_settings(name):
  config = config_of(**{"objective.name": name, "objective.unmasked_from": 1})
  config.objective.arguments = {"ratio": 0.75, "mae_weight": 0.2}
  experiment = build(config)
  assert experiment.model.decoder_hidden_size == 8
  assert experiment.objective.objective.mae_weight == 0.2
  assert experiment.objective.static_choices == [4, "unmasked"]


def test_gradients_do_not_depend_on_the_number_of_devices(tmp_path):
  several_devices.assert_gradients_agree(tmp_path, config_of(batch_size=16), 8)


@pytest.mark.parametrize(("axis", "count"), [("fsdp", 16), ("tensor", 4)])
def test_mesh_that_does_not_divide_the_decoder_is_refused(axis, count):
  config = config_of(batch_size=64, **{f"mesh.{axis}": count})
  config.model.hidden_size, config.model.num_heads = 64, 16
  with pytest.raises(SettingError) as error:
    build(config, devices=jax.devices() * 16)
  assert (error.value.setting, error.value.value) == (f"config.mesh.{axis}", count)
  assert "decoder" in error.value.accepted
