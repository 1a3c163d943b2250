"""Objectives: random draws, losses, invalid settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model, create_objective, create_process, sharding
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.models.masking import spread_lengths
from mdt_jax.objectives.objective import draw_images
from tests import forked, reference
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)


def make_objective(name, network="MDTv2-S/2", **settings):
  depths = dict(depth=4, decode_depth=2)
  model = create_model(network, **TINY, **depths)
  return create_objective(
    name, model=model, process=create_process("gaussian"), **settings
  )


def loss_of(objective, params, draws, static):
  """Compiled as one function, which takes less time than one for each operation."""
  apply = objective.model.apply
  return jax.jit(lambda params: objective.loss(apply, params, draws, static))(params)


def test_both_passes_share_timesteps_and_differ_in_noise():
  config = tiny_config()
  draws = build(config).objective.draw(jax.random.key(0), make_batch(config))
  assert draws.t.shape == (config.batch_size,)
  assert np.abs(draws.noise[:, 0] - draws.noise[:, 1]).max() > 0.1


def test_both_passes_drop_labels_independently_at_the_model_rate():
  config = tiny_config(batch_size=4096)
  batch = {"image": np.zeros((4096, 8, 8, 1), "f"), "label": np.zeros(4096, np.int32)}
  dropped = build(config).objective.draw(jax.random.key(0), batch).y == 10
  np.testing.assert_allclose(dropped.mean(axis=0), 0.1, atol=0.02)
  np.testing.assert_allclose(jnp.all(dropped, axis=1).mean(), 0.01, atol=0.008)


def test_latents_are_sampled_from_their_posterior():
  """Each key gives a new sample. The same key gives the same sample."""
  rng = np.random.default_rng(0)
  moments = rng.uniform(0.5, 1, (512, 2, 4, 4, 3)).astype(np.float16)
  draws = [
    np.asarray(draw_images(jax.random.key(seed), {"moments": moments}))
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert np.abs(draws[0] - draws[2]).max() > 0.1
  normal = (draws[0] - moments[:, 0]) / moments[:, 1]
  np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=0.03)


def test_plain_and_mdt_objectives_have_equal_draws():
  """Runs with and without a masked pass see the same noise and labels."""
  batch = make_batch(tiny_config())
  plain, mdt = (
    make_objective(name).draw(jax.random.key(3), batch) for name in ("plain", "mdt")
  )
  jax.tree.map(np.testing.assert_array_equal, plain, mdt)


def test_mdt_loss_is_the_sum_of_plain_and_masked_loss():
  objective, plain = make_objective("mdt"), make_objective("plain")
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  total, losses = loss_of(objective, params, draws, 8)
  _, unmasked = loss_of(plain, params, draws, None)
  np.testing.assert_allclose(losses["loss"], unmasked["loss"], rtol=1e-6)
  np.testing.assert_allclose(losses["total"], losses["loss"] + losses["masked_loss"])
  np.testing.assert_allclose(total, losses["total"].mean(), rtol=1e-6)


def test_kept_length_depends_only_on_seed_and_step():
  objective = make_objective("mdt", num_lengths=2, multiple=1)
  chosen = [objective.choose_static(1, step) for step in range(50)]
  assert set(chosen) == set(objective.static_choices)
  assert chosen == [objective.choose_static(1, step) for step in range(50)]
  assert chosen != [objective.choose_static(2, step) for step in range(50)]


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("mae", {}, r"^objective = 'mae': accepted are maskdit, mdt, .*plain, sprint, tr"),
    ("mdt", {"groups": 0}, r"^groups = 0: must be at least 1"),
    ("mdt", {"groups": 2, "width": 0.0}, r"^groups = 2: must be 1: width = 0 has one"),
    ("mdt", {"ratio": 0.0, "width": 0.0}, r"^ratio = 0.0: masks nothing: config"),
    ("mdt", {"rate": 0.5}, r"^rate = 0.5: is no setting of the objective 'mdt'"),
    ("mdt", {"ratio": 0.9}, r"^ratio = 0.9: must lie in \[0, 0.8\]"),
    ("plain", {"ratio": 0.5}, r"^ratio = 0.5: is no setting of the objective 'plain'"),
  ],
)
def test_error_names_the_invalid_setting(name, settings, message):
  with pytest.raises(SettingError, match=message):
    make_objective(name, **settings)


def test_each_group_of_a_batch_keeps_its_own_number_of_tokens():
  """The losses of image i are those of a step in which all keep its number."""
  groups = 4
  objective = make_objective("mdt", "MDT-S/2", groups=groups, ratio=0.2, width=0.6)
  (static,) = objective.static_choices
  assert len(set(static)) == groups and objective.largest_static == static
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  total, losses = loss_of(objective, params, draws, static)
  for group, length in enumerate(static):
    _, alone = loss_of(objective, params, draws, length)
    for name, loss in alone.items():
      np.testing.assert_allclose(losses[name][group::groups], loss[group::groups], 1e-5)
  np.testing.assert_allclose(total, losses["total"].mean(), rtol=1e-6)
  # Not the operations of the mean length, because attention grows with its square.
  flops = [objective.flops(length) for length in static]
  assert objective.flops(static) == pytest.approx(np.mean(flops))


def save_losses_of_groups(path):
  """Saves the losses of a batch in two groups, on all devices of the process."""
  settings = {"masking.groups": 2, "masking.width": 0.4, "model.depth": 3}
  settings |= {"batch_size": 16, "model.decode_depth": 1}
  config = tiny_config(**settings)
  experiment = build(config)
  objective = experiment.objective
  params = reference.random_params(experiment.model)
  (static,) = objective.static_choices
  with sharding.use_mesh(experiment.mesh):
    batch = sharding.put_batch(make_batch(config), experiment.mesh, config.batch_size)

    @jax.jit
    def losses(params, batch):
      draws = objective.draw(jax.random.key(0), batch)
      return objective.loss(experiment.model.apply, params, draws, static)[1]

    found = losses(params, batch)
  assert len(found["masked_loss"].sharding.device_set) == jax.device_count()
  np.savez(path, **jax.device_get(found))


def test_groups_do_not_depend_on_the_number_of_devices(tmp_path):
  runs = []
  for count in (1, 8):
    path = tmp_path / f"{count}.npz"
    process = forked.Forked(save_losses_of_groups, path, num_devices=count)
    assert process.end() == 0, process.err
    runs.append(dict(np.load(path)))
  one, eight = runs
  assert len(one["masked_loss"]) == 16 and one["masked_loss"].std() > 0.01
  for name, losses in one.items():
    np.testing.assert_allclose(eight[name], losses, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize(("ratio", "width"), [(0.3, 0.2), (0.0, 0.2), (0.5, 0.1)])
def test_numbers_of_groups_have_the_mean_of_the_released_draw(ratio, width, groups):
  lengths = spread_lengths(256, ratio, width, groups)
  released = [int(256 * (1 - ratio - width * u)) for u in np.linspace(0, 1, 10_001)]
  assert abs(np.mean(lengths) - np.mean(released)) < 0.5
  assert min(released) <= lengths[-1] < lengths[0] <= max(released)


def test_unmasked_objective_is_the_sum_of_two_plain_losses():
  objective, plain = make_objective("mdt_unmasked"), make_objective("plain")
  params = reference.random_params(objective.model)
  draws = objective.draw(jax.random.key(0), make_batch(tiny_config()))
  total, losses = loss_of(objective, params, draws, None)
  passes = [
    loss_of(plain, params, draws.replace(noise=noise, y=y), None)[1]["loss"]
    for noise, y in zip(
      np.split(draws.noise, 2, axis=1), np.split(draws.y, 2, axis=1), strict=True
    )
  ]
  np.testing.assert_allclose(losses["loss"], passes[0], rtol=1e-6)
  np.testing.assert_allclose(losses["second_loss"], passes[1], rtol=1e-6)
  np.testing.assert_allclose(total, np.mean(passes[0] + passes[1]), rtol=1e-6)
  assert np.abs(passes[0] - passes[1]).max() > 1e-3
  assert objective.flops(None) == 2 * plain.flops(None)


@pytest.mark.parametrize("name", ["mdt", "mdt_unmasked"])
def test_objectives_of_mdt_refuse_dit(name):
  with pytest.raises(SettingError, match="DiT") as error:
    make_objective(name, network="DiT-S/2")
  assert (error.value.setting, error.value.value) == ("objective", name)
  assert "plain" in error.value.accepted


def test_float_labels_are_refused():
  batch = make_batch(tiny_config())
  batch["label"] = batch["label"].astype(np.float32)
  with pytest.raises(ValueError, match="label"):
    make_objective("plain").draw(jax.random.key(0), batch)
