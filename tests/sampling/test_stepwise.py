"""Jobs that run one network call at a time draw what the compiled loop draws."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax import SettingError
from mdt_jax.experiment import build
from mdt_jax.sampling.stepwise import Stepper
from tests import reference
from tests.training.tiny import tiny_config

PICTURE = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
MASK = np.zeros((8, 8), bool)
MASK[:, 4:] = True


def make_pipeline(**settings):
  experiment = build(tiny_config(**settings))
  return mdt_jax.Pipeline(experiment, reference.random_params(experiment.model), 0)


@pytest.fixture(scope="module")
def pipeline():
  return make_pipeline()


@pytest.fixture(scope="module")
def stepper():
  return Stepper()


def run(stepper, job):
  """(steps, pixels of the one block) of a job."""
  steps, iterator = [], stepper.run(job)
  while True:
    try:
      steps.append(next(iterator))
    except StopIteration as stop:
      return steps, job.keep_visible(0, stepper.decode(job, stop.value))


def assert_same(found, expected):
  """Rounding may move a pixel by one level."""
  differences = np.abs(found.astype(int) - expected.astype(int))
  assert found.shape == expected.shape
  assert differences.max() <= 1


@pytest.mark.parametrize(
  "arguments",
  [
    {},
    {"method": "ddim", "eta": 0.5, "cfg_power": 0.0},
    {"method": "dpm++sde", "cfg_interval": (0.2, 0.7), "num_steps": 5},
    {"method": "heun"},
    {"weak_condition": "same", "weak_ratio": 0.5},
    {"inpaint": PICTURE, "mask": MASK, "interpolation": 0.5},
    {"inpaint": PICTURE, "mask": MASK, "repeats": 2},
    {"edit": PICTURE, "strength": 0.7},
  ],
  ids=lambda arguments: "-".join(map(str, arguments)) or "default",
)
def test_images_equal_those_of_the_compiled_loop(pipeline, stepper, arguments):
  job = pipeline.job([3, 7], seed=1, **arguments)
  expected = pipeline.draw([3, 7], seed=1, **arguments)
  assert_same(run(stepper, job)[1], expected)


def test_a_flow_model_draws_the_same(stepper):
  flow = make_pipeline(
    **{
      "diffusion.process": "flow",
      "diffusion.variance": "fixed_large",
      "sampling.method": "heun",
    }
  )
  job = flow.job([3, 7], num_steps=3)
  assert_same(run(Stepper(), job)[1], flow.draw([3, 7], num_steps=3))


def test_each_step_predicts_the_picture(pipeline, stepper):
  steps, pixels = run(stepper, pipeline.job([3], num_steps=4, method="euler"))
  assert [(s.call, s.calls) for s in steps] == [(i, 4) for i in (1, 2, 3, 4)]
  # Euler's last step returns the network's last prediction.
  assert_same(stepper.decode(pipeline.job([3]), steps[-1].x0), pixels)


def test_other_steps_scales_and_seeds_do_not_compile_the_network_again(pipeline):
  stepper, traced = Stepper(), []
  model = pipeline.model
  original = type(model)._embed

  def counting(self, *arguments):
    traced.append(1)
    return original(self, *arguments)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(type(model), "_embed", counting)
    run(stepper, pipeline.job([3, 7]))
    first = len(traced)
    for changes in (
      {"seed": 5},
      {"cfg_scale": 4.5},
      {"cfg_power": 1.0},
      {"num_steps": 6},
      {"method": "dpm++"},
    ):
      run(stepper, pipeline.job([4, 8], **changes))
  assert first > 0
  assert len(traced) == first


def test_a_closed_run_stops(pipeline, stepper):
  steps = stepper.run(pipeline.job([3], num_steps=4))
  assert next(steps).call == 1
  steps.close()
  assert list(steps) == []


def test_a_sampler_without_separate_steps_is_refused(stepper):
  flow = make_pipeline(
    **{
      "diffusion.process": "flow",
      "diffusion.variance": "fixed_large",
      "sampling.method": "ode_heun",
    }
  )
  with pytest.raises(SettingError) as caught:
    next(stepper.run(flow.job([3])))
  assert (caught.value.setting, caught.value.value) == ("method", "ode_heun")


def test_a_stepper_keeps_few_programs(pipeline):
  stepper = Stepper()
  for steps in range(1, 13):
    job = pipeline.job([3], num_steps=steps, method="euler", cfg_scale=1.0)
    jax.block_until_ready(next(stepper.run(job)).x0)
  assert len(stepper._loops) <= 8
