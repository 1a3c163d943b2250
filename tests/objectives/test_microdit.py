"""The objective of MicroDiT: agreement with the recorded losses, and its settings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import SettingError, create_model, create_objective, create_process
from mdt_jax.diffusion.process import Process
from mdt_jax.experiment import build
from mdt_jax.models import flops
from mdt_jax.objectives.objective import Draws
from mdt_jax.objectives.tokens import mean_over
from mdt_jax.pretrained.torch_mdt import attributes_of, to_torch
from tests import reference
from tests.models import test_microdit
from tests.objectives import several_devices
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

NAMES = test_microdit.NAMES
TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)


class Recorded(Process):
  """The recorded loss: x_t is x, and the target of all channels is `noise`."""

  end_time = 1000

  def alpha(self, t):
    return jnp.ones(t.shape)

  def sigma(self, t):
    return jnp.zeros(t.shape)

  def q_sample(self, x0, t, noise):
    return x0

  def target(self, x0, noise, t):
    return noise

  def to_x0(self, output, x_t, t):
    return output

  def sample_t(self, key, batch):
    return jnp.zeros(batch)


@functools.cache
def recorded_loss(name, masked=True):
  """(loss, gradients with the names of the recording)."""
  model, params = test_microdit.load_model(name)
  recorded = reference.load(name)
  x, t, y = test_microdit.inputs(name)
  draws = Draws(
    x0=x,
    t=jnp.asarray(t),
    weights=jnp.ones(len(t)),
    noise=jnp.asarray(reference.to_nhwc(recorded["target"]))[:, None],
    y=jnp.asarray(y)[:, None],
    mask_noise=jnp.asarray(recorded["mask_noise"]),
  )
  ratio = float(recorded["mask_ratio"]) if masked else 0.0
  objective = create_objective("microdit", model=model, process=Recorded(), ratio=ratio)

  def run(params):
    return objective.loss(model.apply, params, draws, objective.largest_static)[0]

  if not masked:
    return jax.jit(run)(params), {}
  loss, gradients = jax.jit(jax.value_and_grad(run))(params)
  return loss, to_torch(attributes_of(model), gradients)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_loss_matches_reference(name, masked):
  loss, _ = recorded_loss(name, masked)
  expected = reference.load(name)["loss" if masked else "loss_all_tokens"]
  reference.assert_matches("MicroDiT, loss", loss, expected, 2e-5)


@pytest.mark.parametrize(
  ("name", "key"),
  [(n, k) for n in NAMES for k in reference.load(n) if k.startswith("grad/")],
)
def test_gradient_matches_reference(name, key):
  reference.assert_matches(
    "MicroDiT, gradient of every parameter",
    recorded_loss(name)[1][key.removeprefix("grad/")],
    reference.load(name)[key],
    reference.GRADIENT_TOLERANCE,
  )


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_parameter_has_a_recorded_gradient(name):
  keys = reference.load(name)
  recorded = {key.removeprefix("grad/") for key in keys if key.startswith("grad/")}
  assert recorded | {"pos_embed"} == set(recorded_loss(name)[1])
  assert test_microdit.load_model(name)[0].frozen == ("pos_embed",)


# Properties.


def test_mean_gives_each_kept_token_the_same_weight():
  """(2, 4, 6, 3) pixels of 2 x 3 tokens, each of one value, of which two are kept."""
  tokens = jnp.arange(12.0).reshape(2, 2, 3)
  pixels = tokens.repeat(2, 1).repeat(2, 2)[..., None] * jnp.array([0.0, 1.0, 2.0])
  noise = jnp.array([[5, 0, 4, 3, 1, 2], [0, 5, 4, 3, 2, 1]])
  mask = create_model("MicroDiT-S/2").token_mask(noise, 2)
  mean = mean_over(~mask.removed, 2)
  np.testing.assert_allclose(mean(pixels), [(1 + 4) / 2, (6 + 11) / 2])


def make_objective(network="MicroDiT-S/2", process="gaussian", name="microdit", **rest):
  arguments = {"variance": "fixed_large"} if process == "gaussian" else {}
  mixer = {"mixer_depth": 1} if network.startswith("MicroDiT") else {}
  model = create_model(network, **TINY, depth=3, learn_sigma=False, **mixer)
  process = create_process(process, **arguments)
  return create_objective(name, model=model, process=process, **rest)


def run_loss(objective, params, draws, static):
  """(loss, losses), compiled."""
  return jax.jit(lambda p: objective.loss(objective.model.apply, p, draws, static))(
    params
  )


PROCESSES = ["gaussian", "flow", "edm"]


@pytest.mark.parametrize("process", PROCESSES)
def test_ratio_zero_gives_the_loss_of_one_unmasked_pass(process):
  masked = make_objective(process=process, ratio=0.0)
  plain = make_objective(process=process, name="plain")
  params = reference.random_params(masked.model)
  draws = masked.draw(jax.random.key(0), make_batch(tiny_config()))
  losses = [run_loss(o, params, draws, o.largest_static) for o in (masked, plain)]
  jax.tree.map(np.testing.assert_array_equal, *losses)


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_trains_all_parameters_on_kept_tokens(process):
  objective = make_objective(process=process)
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  loss = functools.partial(objective.loss, objective.model.apply)
  gradient = jax.jit(jax.grad(lambda p: loss(p, draws, 4)[0]))(params)
  for name in ("mixer_blocks", "blocks", "final_layer"):
    leaves = jax.tree.leaves(gradient[name])
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves), name


def test_targets_of_removed_tokens_do_not_count():
  """Noise is the target, and the network sees it only in x_t, which stays."""
  model, params = test_microdit.load_model()
  objective = create_objective("microdit", model=model, process=Recorded())
  mask = test_microdit.recorded_mask()
  noise = jax.random.normal(jax.random.key(1), (4, 1, 12, 12, 8))
  x, t, y = test_microdit.inputs()

  def loss(noise):
    draws = Draws(
      x0=x,
      t=jnp.asarray(t),
      weights=jnp.ones(4),
      noise=noise,
      y=jnp.asarray(y)[:, None],
      mask_noise=jnp.asarray(reference.load(NAMES[0])["mask_noise"]),
    )
    return objective.loss(model.apply, params, draws, 9)[0]

  gradient = np.asarray(jax.jit(jax.grad(loss))(noise))[:, 0]
  removed = test_microdit.as_pixels(np.asarray(mask.removed))
  removed = np.broadcast_to(removed, gradient.shape)
  assert (gradient[removed] == 0).all() and (gradient[~removed] != 0).all()


def test_variational_bound_is_that_of_the_kept_tokens():
  """What the output holds at removed tokens does not count."""
  model = create_model("MicroDiT-S/2", **TINY, depth=1, mixer_depth=1, learn_sigma=True)
  process = create_process("gaussian", variance="learned_range")
  objective = create_objective("microdit", model=model, process=process)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  mask = model.token_mask(draws.mask_noise, 4)
  removed = test_microdit.as_pixels(np.asarray(mask.removed))

  def losses(value):
    def apply(params, x_t, t, y, token_mask):
      noise = draws.noise[:, 0]
      output = jnp.concatenate([0 * noise, 0.3 * jnp.ones_like(noise)], -1)
      return jnp.where(removed, value, output)

    return objective.loss(apply, {}, draws, 4)[1]

  jax.tree.map(np.testing.assert_array_equal, losses(0.0), losses(9.0))
  assert (np.asarray(losses(0.0)["vb"]) > 0).all()


def test_default_ratio_is_the_released_one():
  objective = make_objective()
  assert objective.static_choices == (4,)
  assert "4 of 16" in objective.summary


def test_schedule_lowers_the_ratio():
  objective = make_objective(schedule="cosine4", num_steps=100)
  kept = [objective.choose_static(0, step) for step in (0, 50, 100)]
  assert kept[0] == 4 < kept[1] < kept[2] == 16


def test_step_costs_three_forward_passes():
  objective = make_objective()
  assert objective.flops(4) == 3 * flops.forward_flops(objective.model, 4)
  assert objective.flops(16) == 3 * flops.forward_flops(objective.model)


@pytest.mark.parametrize("network", ["TREAD-S/2", "MDT-S/2"])
def test_other_networks_that_accept_a_mask_train_on_kept_tokens(network):
  depth = {"route_end": 2} if network.startswith("TREAD") else {"decode_depth": 1}
  model = create_model(network, **TINY, depth=3, learn_sigma=False, **depth)
  objective = create_objective("microdit", model=model, process=create_process("edm"))
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  _, losses = run_loss(objective, reference.random_params(model), draws, 4)
  assert np.isfinite(losses["total"]).all()


def test_network_without_a_mask_is_refused():
  with pytest.raises(SettingError) as error:
    make_objective("DiT-S/2")
  assert (error.value.setting, error.value.value) == ("objective", "microdit")
  assert "accepts no token mask; use a MicroDiT" in error.value.accepted


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.95, "half"])
def test_ratio_that_keeps_no_token_is_refused(ratio):
  with pytest.raises(SettingError) as error:
    make_objective(ratio=ratio)
  assert error.value.setting == "ratio"


@pytest.mark.parametrize(
  ("name", "accepted"),
  [
    ("mdt", "accepted is plain or microdit"),
    ("mdt_unmasked", "accepted is plain or microdit"),
    ("tread", "has no route"),
  ],
)
def test_other_objectives_refuse_microdit(name, accepted):
  with pytest.raises(SettingError, match=accepted) as error:
    make_objective(name=name)
  assert error.value.setting == "objective"


def tiny_run(**settings):
  settings = {"model.name": "MicroDiT-S/2", "model.depth": 2, **settings}
  settings |= {"model.mixer_depth": 1, "diffusion.process": "edm"}
  settings |= {"sampling.method": "heun"}
  return tiny_config(**settings)


def test_config_chooses_mixer_ratio_and_unmasked_phase():
  config = tiny_run(**{"model.mixer_hidden_size": 12, "model.mixer_num_heads": 3})
  config.objective.arguments = {"ratio": 0.5}
  config.objective.unmasked_from = 3
  experiment = build(config)
  model = experiment.model
  assert (model.mixer_depth, model.mixer_width, model.mixer_heads) == (1, 12, 3)
  objective = experiment.objective
  assert [objective.choose_static(0, step) for step in (2, 3)] == [8, "unmasked"]


def test_run_cannot_have_a_network_that_reads_captions():
  with pytest.raises(SettingError, match="reads captions") as error:
    build(tiny_config(**{"model.name": "MicroDiTText-Tiny/2"}))
  assert error.value.setting == "config.model.name"


def test_gradients_do_not_depend_on_the_number_of_devices(tmp_path):
  sizes = {"model.mixer_hidden_size": 24, "model.mixer_num_heads": 2, "batch_size": 16}
  several_devices.assert_gradients_agree(tmp_path, tiny_run(**sizes), 4)
