"""Sparse guidance: agreement with the released code of TREAD, and what must hold."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import Pipeline, SettingError, create_model
from mdt_jax.checkpoints.loading import Checkpoint
from mdt_jax.diffusion.guidance import Guidance, TokenShares
from mdt_jax.diffusion.samplers import Sampler, sample
from mdt_jax.experiment import build
from mdt_jax.models.flops import forward_flops
from mdt_jax.sampling import weak_networks
from mdt_jax.sampling.generator import make_generator
from mdt_jax.sampling.token_guidance import (
  Pair,
  check_tokens,
  make_model_fn,
  sampling_flops,
)
from mdt_jax.training import loop
from tests import reference
from tests.models import test_sprint, test_tread
from tests.models.test_flops import product_flops
from tests.objectives.test_tread import FLOW
from tests.training.tiny import tiny_config

RECORDED = test_tread.RECORDED
NULL = test_tread.NUM_CLASSES
SHARES = dict(
  strong=float(RECORDED["sg/gamma_strong"]), weak=float(RECORDED["sg/gamma_weak"])
)
OMEGA = float(RECORDED["sg/omega"])
IDS = np.arange(4, dtype=np.uint32)
LABELS = np.array([3, 1, 4, 1])


def make_sampler(process=FLOW, num_steps=3, method="ode_euler", **settings):
  tokens = {name: settings.pop(name) for name in TOKENS if name in settings}
  settings = {"power": 0.0, "channels": None, "scale": OMEGA, **settings}
  settings |= {"num_timesteps": process.end_network_time}
  guidance = Guidance(tokens=TokenShares(**tokens), **settings)
  return Sampler.create(process, guidance, method=method, num_steps=num_steps)


TOKENS = ("strong", "weak", "schedule", "weak_condition")


def recorded_fn(noise_of, strong_label="cond", weak_label="cond"):
  """Guided function of the recorded TREAD, whose masks come from recorded noise."""
  model, params = test_tread.load_model()
  y = jnp.asarray(RECORDED["y"])
  null = jnp.full_like(y, NULL)
  sampler = make_sampler(
    **SHARES, weak_condition="same" if strong_label == weak_label else "null"
  )
  labels = y if strong_label == "cond" else null
  return make_model_fn(model, params, labels, null, sampler, noise_of)


@pytest.mark.parametrize(
  ("strong", "weak"), [("cond", "cond"), ("cond", "null"), ("null", "null")]
)
def test_guided_output_matches_reference(strong, weak):
  def noise_of(t, is_weak):
    return jnp.asarray(RECORDED[f"sg/noise_{'weak' if is_weak else 'strong'}"])

  model_fn = recorded_fn(noise_of, strong, weak)
  reference.assert_matches(
    "TREAD, sparse guidance",
    reference.to_nchw(jax.jit(model_fn)(test_tread.images("x"), RECORDED["t"])),
    RECORDED[f"sg/out_{strong}_{weak}"],
    reference.FORWARD_TOLERANCE,
  )


def test_samples_match_reference():
  """The released sampler drops the label in both passes."""
  steps = int(RECORDED["rf/steps"])
  noise = jnp.asarray(RECORDED["rf/noise"])  # (steps, 2, B, L)

  def noise_of(t, is_weak):
    step = jnp.round((1 - t[0]) * steps).astype(jnp.int32)  # t = 1, 2/3, 1/3
    return noise[step, int(is_weak)]

  model_fn = recorded_fn(noise_of, "null", "null")
  sampler = make_sampler(num_steps=steps)
  run = functools.partial(sample, model_fn, sampler.process, method="ode_euler")
  found = jax.jit(lambda x: run(x, jax.random.key(0), arguments=sampler.arguments))(
    test_tread.images("rf/z")
  )
  reference.assert_matches(
    "TREAD, samples with sparse guidance",
    reference.to_nchw(found),
    RECORDED["rf/sample_tread"],
    reference.LOOP_TOLERANCE,
  )


def test_path_drop_guidance_matches_reference():
  """The weak pass has the null label, and leaves out all tokens of middle blocks."""
  recorded = test_sprint.RECORDED
  model, params = test_sprint.load_model()
  y, scale = jnp.asarray(recorded["y"]), float(recorded["cfg/scale"])
  sampler = make_sampler(weak=1.0, scale=scale)

  def noise_of(t, is_weak):
    assert is_weak
    return jnp.zeros((len(t), model.num_tokens))

  null = jnp.full_like(y, model.num_classes)
  model_fn = make_model_fn(model, params, y, null, sampler, noise_of)
  reference.assert_matches(
    "SPRINT, guided by path drop",
    reference.to_nchw(jax.jit(model_fn)(test_sprint.images("x"), recorded["t"])),
    recorded["pdg/out"],
    reference.LOOP_TOLERANCE,
  )
  assert sampling_flops(model, sampler) == 3 * (
    forward_flops(model) + forward_flops(model, 0)
  )


# Generators.

SPARSE = {
  "sampling.cfg_scale": 2.0,
  "sampling.weak_condition": "same",
  "sampling.weak_ratio": 0.75,
}


@functools.cache
def make_images(network="MDTv2-S/2", **settings):
  """Function (ids, labels) -> latents of a tiny random network."""
  named = {name.replace("__", "."): value for name, value in settings.items()}
  if network.startswith("MaskDiT"):  # which is not trained to predict noise
    named = {"diffusion.process": "flow", **named}
  config = tiny_config(**{"model.name": network, "model.depth": 6, **named})
  experiment = build(config)
  params = reference.random_params(experiment.model)
  generate = make_generator(experiment.model, experiment.sampler)
  seed = np.uint32(0)
  return lambda ids=IDS, labels=LABELS: np.asarray(generate(params, labels, ids, seed))


def sparse(network="MDTv2-S/2", **settings):
  named = {**SPARSE, **{f"sampling.{name}": value for name, value in settings.items()}}
  return make_images(network, **{k.replace(".", "__"): v for k, v in named.items()})


@pytest.mark.parametrize(
  "network", ["MDT-S/2", "MDTv2-S/2", "MaskDiT-S/2", "TREAD-S/2", "SPRINT-S/2"]
)
def test_networks_sample_with_sparse_guidance(network):
  options = {"method": "heun"}
  images = sparse(network, **options)()
  assert np.isfinite(images).all()
  unguided = sparse(network, **options, cfg_scale=1.0, weak_ratio=0.0)()
  assert np.abs(images - unguided).max() > 1e-3


def test_image_depends_on_its_number_alone():
  generate = sparse()
  whole, part = generate(), generate(IDS[[2, 0]], LABELS[[2, 0]])
  np.testing.assert_allclose(part, whole[[2, 0]], atol=1e-4 * np.abs(whole).max())
  assert np.abs(whole[1] - whole[3]).max() > 0.1  # the same label


@pytest.mark.parametrize("weak_condition", ["null", "same"])
def test_strong_and_weak_network_are_guided_apart(weak_condition):
  """The same weights as a weak network give the images of one network."""
  settings = {**SPARSE, "sampling.weak_condition": weak_condition}
  config = tiny_config(**settings)
  experiment = build(config)
  model, sampler = experiment.model, experiment.sampler
  params = reference.random_params(model)
  other = jax.tree.map(lambda leaf: 0.9 * leaf, params)
  one = make_generator(model, sampler)
  two = make_generator(model, sampler, weak_model=model)
  arguments = LABELS, IDS, np.uint32(0)
  expected = np.asarray(one(params, *arguments))
  np.testing.assert_array_equal(two(Pair(params, params), *arguments), expected)
  assert np.abs(two(Pair(params, other), *arguments) - expected).max() > 1e-3


def test_weak_network_with_all_tokens_is_classifier_free_guidance():
  config = tiny_config()
  experiment = build(config)
  model, sampler = experiment.model, experiment.sampler
  params = reference.random_params(model)
  arguments = LABELS, IDS, np.uint32(0)
  found = make_generator(model, sampler, weak_model=model)(
    Pair(params, params), *arguments
  )
  expected = np.asarray(make_generator(model, sampler)(params, *arguments))
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_network_of_another_architecture_may_guide(monkeypatch):
  """The weak pass of the same label and step is another one, if the network is."""
  settings = {"sampling.weak_condition": "same", "sampling.cfg_scale": 2.0}
  own, other = (
    build(tiny_config(**settings, **{"model.name": name}))
    for name in ("MDT-S/2", "DiT-S/2")
  )
  params = reference.random_params(other.model)
  checkpoint = Checkpoint(other, params, 7)
  monkeypatch.setattr(weak_networks, "load_run", lambda *_: checkpoint)
  arguments = dict(own_step=7, own_params=reference.random_params(own.model))
  weak = weak_networks.load_weak("run", None, own, **arguments)
  assert weak.model is other.model
  with pytest.raises(SettingError, match="must hold other parameters"):
    weak_networks.load_weak("run", None, other, own_step=7, own_params=params)


# Schedules and cost.


def test_cosine_moves_the_shares_between_both_passes():
  tokens = TokenShares(strong=0.35, weak=0.7, schedule="cosine")
  noise = jnp.linspace(1, 0, 101)
  strong, weak = (
    np.asarray(tokens.ratios(is_weak))[tokens.choose(noise, is_weak)]
    for is_weak in (False, True)
  )
  assert (strong[0], weak[0], strong[-1], weak[-1]) == (0, 0.7, 0.35, 0)
  assert (np.diff(strong) >= 0).all() and (np.diff(weak) <= 0).all()
  assert len(set(weak)) == 8
  np.testing.assert_allclose(weak, 0.35 * (1 - np.cos(np.pi * noise)), atol=0.051)
  np.testing.assert_allclose(strong / 0.35 + weak / 0.7, 1, atol=1 / 7)


def test_constant_shares_have_one_length():
  tokens = TokenShares(strong=0.25, weak=0.5)
  assert (tokens.ratios(False), tokens.ratios(True)) == ((0.25,), (0.5,))


MODEL = create_model(
  "TREAD-S/2", input_size=8, num_classes=5, hidden_size=32, depth=7, num_heads=2
)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"scale": 1.0},
    {"weak": 0.5, "weak_condition": "same"},
    {"strong": 0.25, "weak": 0.75},
  ],
)
@pytest.mark.parametrize("method", ["ode_euler", "ode_heun", "heun"])
def test_cost_is_that_of_the_traced_sampler(settings, method):
  sampler = make_sampler(num_steps=5, method=method, **settings)
  generate = make_generator(MODEL, sampler, platform="gpu")
  params = jax.eval_shape(
    MODEL.init,
    jax.random.key(0),
    jnp.zeros((1, 8, 8, 4)),
    jnp.zeros(1),
    jnp.zeros(1, int),
  )["params"]
  jaxpr = jax.make_jaxpr(generate)(params, LABELS, IDS, np.uint32(0))
  # The Runge-Kutta steps themselves are small products.
  assert sampling_flops(MODEL, sampler) == pytest.approx(
    product_flops(jaxpr.jaxpr) / len(LABELS), rel=1e-3
  )


def test_cost_leaves_out_the_weak_pass_outside_of_the_interval():
  """Of 10 steps at t = 1, 0.9, …, 0.1 four lie in [0.25, 0.65]."""
  sampler = make_sampler(num_steps=10, interval=(0.25, 0.65))
  assert sampling_flops(MODEL, sampler) == pytest.approx(14 * forward_flops(MODEL))


def test_cost_of_a_schedule_is_the_mean_over_the_steps():
  sampler = make_sampler(num_steps=50, weak=0.75, schedule="cosine")
  ends = [
    sampling_flops(MODEL, make_sampler(num_steps=50, weak=weak)) for weak in (0.0, 0.75)
  ]
  found = sampling_flops(MODEL, sampler)
  assert found == pytest.approx(sum(ends) / 2, rel=0.02)


def test_schedule_uses_few_tokens_at_first():
  """A schedule draws other images than its ends."""
  images = [
    sparse(ratio_schedule=schedule, method="heun")()
    for schedule in ("constant", "cosine")
  ]
  assert np.isfinite(images[1]).all()
  assert np.abs(images[0] - images[1]).max() > 1e-3


# Bad input.


@pytest.mark.parametrize(
  ("network", "tokens", "scale", "setting"),
  [
    ("DiT-S/2", {"weak": 0.5}, 2.0, "weak_ratio"),
    ("DiT-S/2", {"strong": 0.5, "weak": 0.5}, 2.0, "strong_ratio"),
    ("TREAD-S/2", {"weak": 1.0}, 2.0, "weak_ratio"),
    ("MicroDiT-S/2", {"weak": 0.5}, 2.0, "weak_ratio"),
    ("MDT-S/2", {"weak": 0.999}, 2.0, "weak_ratio"),
    ("MDT-S/2", {"weak_condition": "same"}, 2.0, "weak_condition"),
    ("MDT-S/2", {"strong": 0.5, "weak": 0.5, "weak_condition": "same"}, 2.0, None),
    ("MDT-S/2", {"schedule": "cosine"}, 2.0, "ratio_schedule"),
  ],
)
def test_shares_that_a_network_cannot_leave_out_are_refused(
  network, tokens, scale, setting
):
  model = create_model(network, input_size=8)
  guidance = Guidance(scale=scale, tokens=TokenShares(**tokens))
  with pytest.raises(SettingError) as error:
    check_tokens(model, guidance, None)
  assert error.value.setting == f"config.sampling.{setting or 'weak_condition'}"


@pytest.mark.parametrize(
  ("settings", "name"),
  [
    ({"weak_ratio": 1.5}, "weak_ratio"),
    ({"strong_ratio": 1.0, "weak_ratio": 1.0}, "strong_ratio"),
    ({"strong_ratio": 0.5, "weak_ratio": 0.25}, "weak_ratio"),
    ({"weak_ratio": float("nan")}, "weak_ratio"),
    ({"weak_condition": "none"}, "weak_condition"),
    ({"ratio_schedule": "linear"}, "ratio_schedule"),
  ],
)
def test_settings_out_of_range_are_refused(settings, name):
  named = {f"sampling.{key}": value for key, value in settings.items()}
  with pytest.raises(SettingError) as error:
    build(tiny_config(**{"sampling.cfg_scale": 2.0, **named}))
  assert error.value.setting == f"config.sampling.{name}"


def test_equal_shares_of_a_schedule_are_accepted():
  """They are equal at the middle of sampling alone."""
  tokens = TokenShares(0.5, 0.5, schedule="cosine", weak_condition="same")
  model = create_model("MDT-S/2", input_size=8)
  check_tokens(model, Guidance(scale=2.0, tokens=tokens), None)


def test_training_refuses_shares_that_the_network_cannot_leave_out(tmp_path):
  config = tiny_config(**{"model.name": "DiT-S/2", "sampling.weak_ratio": 0.5})
  with pytest.raises(SettingError) as error:
    loop.train(config, tmp_path / "run")
  assert error.value.setting == "config.sampling.weak_ratio"
  assert not (tmp_path / "run").exists()


# Pipelines.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  loop.train(tiny_config(**{"sampling.cfg_scale": 2.0}), workdir)
  return workdir


def test_pipeline_guides_by_an_earlier_checkpoint(run):
  pipeline = Pipeline.from_checkpoint(run)
  same, earlier = (
    pipeline.job([3, 1], weak_checkpoint=run, weak_step=step) for step in (4, 2)
  )
  plain = pipeline.draw([3, 1])
  np.testing.assert_allclose(
    next(same.generate_blocks([0]))[1].astype(int), plain.astype(int), atol=1
  )
  assert same.describe() != earlier.describe()
  assert earlier.flops == same.flops == pipeline.job([3, 1]).flops
  weak = dict(weak_checkpoint=run, weak_step=2, weak_condition="same")
  assert pipeline.draw([3, 1], **weak).shape == plain.shape


def test_descriptions_of_older_folders_stay(run):
  described = Pipeline.from_checkpoint(run).job([3]).describe()
  assert not [name for name in described if "weak" in name or "ratio" in name]


@pytest.mark.parametrize(
  ("arguments", "name"),
  [
    ({"weak_step": 2}, "weak_step"),
    ({"weak_checkpoint": "missing"}, "weak_checkpoint"),
    ({"weak_checkpoint": "RUN", "weak_step": 3}, "weak_step"),
    ({"weak_checkpoint": "RUN", "cfg_scale": 1.0}, "weak_checkpoint"),
    ({"weak_checkpoint": "RUN", "weak_condition": "same"}, "weak_checkpoint"),
    ({"weak_ratio": 1.0}, "weak_ratio"),
    ({"weak_condition": "same"}, "weak_condition"),
    ({"strong_ratio": 0.5, "weak_ratio": 0.1}, "weak_ratio"),
  ],
)
def test_pipeline_names_its_arguments_in_errors(run, arguments, name):
  arguments = {k: run if v == "RUN" else v for k, v in arguments.items()}
  with pytest.raises(SettingError) as error:
    Pipeline.from_checkpoint(run).job([3], **arguments)
  assert error.value.setting == name
  assert "\n" not in str(error.value)


def test_inpainting_with_sparse_guidance_does_not_interpolate(run):
  pipeline, mask = Pipeline.from_checkpoint(run), np.zeros((8, 8), np.uint8)
  mask[:4] = 255
  arguments = dict(inpaint=np.zeros((8, 8), np.uint8), mask=mask, weak_ratio=0.5)
  assert pipeline.job([3], **arguments).task.interpolation == 0
  with pytest.raises(SettingError) as error:
    pipeline.job([3], **arguments, interpolation=0.5)
  assert error.value.setting == "interpolation"
