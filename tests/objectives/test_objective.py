"""Objectives: random draws, losses, invalid settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import create_model, create_objective, create_process
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.objectives.objective import draw_images
from tests import reference
from tests.training.test_step import make_batch
from tests.training.tiny import tiny_config

TINY = dict(input_size=8, in_channels=1, num_classes=10, hidden_size=16, num_heads=2)


def make_objective(name, network="MDTv2-S/2", **settings):
  depths = dict(depth=4, decode_depth=2)
  model = create_model(network, **TINY, **depths)
  return create_objective(
    name, model=model, process=create_process("gaussian"), **settings
  )


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
  apply = objective.model.apply
  total, losses = objective.loss(apply, params, draws, 8)
  _, unmasked = plain.loss(apply, params, draws, None)
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
    ("mae", {}, r"^objective = 'mae': accepted are mdt, plain"),
    ("mdt", {"rate": 0.5}, r"^rate = 0.5: is no setting of the objective 'mdt'"),
    ("mdt", {"ratio": 0.9}, r"^ratio = 0.9: must lie in \[0, 0.8\]"),
    ("plain", {"ratio": 0.5}, r"^ratio = 0.5: is no setting of the objective 'plain'"),
  ],
)
def test_error_names_the_invalid_setting(name, settings, message):
  with pytest.raises(SettingError, match=message):
    make_objective(name, **settings)


def test_mdt_objective_refuses_dit():
  with pytest.raises(SettingError, match="DiT") as error:
    make_objective("mdt", network="DiT-S/2")
  assert (error.value.setting, error.value.value) == ("objective", "mdt")
  assert "plain" in error.value.accepted


def test_float_labels_are_refused():
  batch = make_batch(tiny_config())
  batch["label"] = batch["label"].astype(np.float32)
  with pytest.raises(ValueError, match="label"):
    make_objective("plain").draw(jax.random.key(0), batch)
