"""Runs of the processes flow and edm: trained, resumed, sampled and edited."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax import Pipeline, build
from mdt_jax.errors import SettingError
from mdt_jax.training.loop import train
from tests import forked
from tests.seams.digits import assert_learns, train_losses
from tests.training.tiny import tiny_config, tiny_dit_config

SAMPLERS = {
  "dpm++": {},
  "ode_heun": {},
  "sde": {"arguments": {"last_step": "tweedie"}},
  "edm": {"arguments": {"churn": 10.0}},
}


def of_process(process, make=tiny_config, **settings):
  names = {"diffusion.process": process, "sampling.method": "ode_heun"}
  return make(**{**names, **settings})


@pytest.fixture(scope="module", params=["flow", "edm"])
def trained(request, tmp_path_factory):
  workdir = tmp_path_factory.mktemp(request.param) / "run"
  train(of_process(request.param), workdir)
  return workdir


@pytest.mark.parametrize("process", ["flow", "edm"])
@pytest.mark.parametrize("objective", ["plain", "mdt"])
def test_both_objectives_learn_on_every_process(tmp_path, process, objective):
  settings = {"diffusion.process": process, "objective.name": objective}
  losses = train_losses(tmp_path, **settings, **{"sampling.method": "ode_heun"})
  assert_learns(losses)


@pytest.mark.parametrize("method", SAMPLERS)
def test_run_is_sampled_by_every_kind_of_method(trained, method):
  pipeline = Pipeline.from_checkpoint(trained)
  options = {"method": method, "num_steps": 3, **SAMPLERS[method]}
  images = pipeline.draw([3, 1, 4], seed=5, **options)
  assert images.shape == (3, 8, 8, 1) and images.std() > 0
  # An image depends on its seed and number alone.
  (alone,) = pipeline.draw([3], seed=5, **options)
  np.testing.assert_allclose(alone, images[0], atol=1)


def test_error_names_the_argument_of_a_sampler(trained):
  pipeline = Pipeline.from_checkpoint(trained)
  with pytest.raises(SettingError) as error:
    pipeline.job([3], method="edm", arguments={"churn": -1.0})
  assert error.value.setting == "arguments.churn"


def test_edit_keeps_what_little_noise_leaves(trained):
  pipeline = Pipeline.from_checkpoint(trained)
  image = np.full((8, 8, 1), 200, np.uint8)
  image[:4] = 50
  edited = pipeline.job([3], edit=image, strength=0.05, num_steps=40)
  (_, found) = next(iter(edited.generate_blocks(range(1))))
  difference = np.abs(np.asarray(found[0], float) - image).mean()
  assert difference < 60


def test_inpainting_keeps_the_visible_part(trained):
  pipeline = Pipeline.from_checkpoint(trained)
  image = np.full((8, 8, 1), 200, np.uint8)
  mask = np.zeros((8, 8), bool)
  mask[:, 4:] = True
  job = pipeline.job([3], inpaint=image, mask=mask, method="dpm++", num_steps=3)
  (_, found) = next(iter(job.generate_blocks(range(1))))
  np.testing.assert_array_equal(np.asarray(found[0])[:, :4], image[:, :4])
  with pytest.raises(SettingError, match="cannot inpaint; accepted are euler, heun"):
    pipeline.job([3], inpaint=image, mask=mask, num_steps=3)


def test_run_resumes_as_the_same_process_alone(trained):
  process = trained.parent.name[:-1]
  train(of_process(process, num_steps=6), trained)
  other = {"flow": "edm", "edm": "flow"}[process]
  with pytest.raises(SettingError, match=f"config.diffusion.process was '{process}'"):
    train(of_process(other, num_steps=6), trained)


def test_settings_without_effect_are_named(tmp_path, caplog):
  settings = {"diffusion.prediction": "x0", "num_steps": 1}
  train(of_process("flow", tiny_dit_config, **settings), tmp_path / "run")
  assert "no effect on the process flow: config.diffusion.prediction = 'x0'" in (
    caplog.text
  )


def test_released_methods_need_the_gaussian_process():
  with pytest.raises(SettingError, match=r"config.sampling.method = 'ddpm'.*gaussian"):
    _ = build(tiny_dit_config(**{"diffusion.process": "flow"})).sampler


BAD = [
  ("--config.diffusion.arguments={'path': 'cubic'}", "accepted are linear, gvp, vp"),
  ("--config.diffusion.arguments={'time_std': 'a'}", "must be a number"),
  ("--config.diffusion.arguments={'sigma_data': 1.0}", "accepted are data_time"),
  ("--config.sampling.arguments={'churn': 1.0}", "is no setting of the method"),
  ("--config.sampling.method=ddpm", "gaussian"),
  ("--config.sampling.arguments={'norm': 1.0}", "config.sampling.arguments.norm"),
  ("--config.sampling.num_steps=100001", "must lie in [1, 100,000]"),
  ("--config.diffusion.arguments={1: 2}", "whose names are texts"),
  ("--config.diffusion.process=gaussian", "continuous time"),
]


@pytest.mark.parametrize(("flag", "text"), BAD)
def test_bad_settings_are_refused_in_one_line(tmp_path, flag, text):
  process = forked.command(
    "mdt_jax.main",
    "--config=tests/faults/run_config.py",
    f"--workdir={tmp_path / 'run'}",
    "--config.timestep_sampler=uniform",
    "--config.diffusion.process=flow",
    "--config.sampling.method=ode_heun",
    flag,
  )
  assert process.end() == 2, process.err
  (line,) = process.err.strip().splitlines()
  assert line.startswith("error: ") and text in line
  assert not (tmp_path / "run").exists()
