"""The engine of the demo: pictures with progress, classes, code, errors."""

from __future__ import annotations

import dataclasses
import re
import shlex

import numpy as np
import pytest

import mdt_jax
from mdt_jax import SettingError
from mdt_jax.data.class_labels import DataLabels
from mdt_jax.demo.commands import Source
from mdt_jax.demo.engine import ANY_CLASS, Engine
from mdt_jax.experiment import build
from tests import reference
from tests.cli.commands import run as run_command
from tests.sampling.test_pipeline import save_tiny
from tests.training.tiny import tiny_config

PICTURE = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4


def make_engine(**settings):
  experiment = build(tiny_config(**settings))
  pipeline = mdt_jax.Pipeline(
    experiment, reference.random_params(experiment.model), step=0
  )
  return Engine(pipeline, Source("runs/tiny"))


@pytest.fixture(scope="module")
def engine():
  return make_engine()


def test_pictures_equal_those_of_the_pipeline(engine):
  settings = dataclasses.replace(engine.defaults(), labels=(3, 7), count=4, seed=9)
  *_, last = engine.draw(settings)
  expected = engine.pipeline.draw([3, 7, 3, 7], seed=9)
  assert last.is_done
  assert np.abs(last.images.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_strip_ends_with_the_pictures(engine, steps):
  settings = dataclasses.replace(engine.defaults(), steps=steps, count=1)
  progress = list(engine.draw(settings))
  assert [at.step for at in progress] == [*range(1, steps + 1), steps]
  assert [at.is_done for at in progress] == [False] * steps + [True]
  stages = progress[-1].stages
  assert len(stages) == min(steps, 8)
  np.testing.assert_array_equal(stages[-1], progress[-1].images)


def test_inpainting_keeps_the_visible_part(engine):
  hidden = np.zeros((8, 8), bool)
  hidden[2:7, 3:8] = True
  settings = dataclasses.replace(engine.defaults(), count=1)
  *_, last = engine.inpaint(settings, PICTURE, hidden, 0.5)
  np.testing.assert_array_equal(last.images[0][~hidden], PICTURE[~hidden])
  assert (last.images[0][hidden] != PICTURE[hidden]).any()


def test_editing_draws_a_picture(engine):
  settings = dataclasses.replace(engine.defaults(), count=1)
  *_, last = engine.edit(settings, PICTURE, 0.5)
  assert last.images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
  ("changes", "setting"),
  [
    ({"count": 17}, "pictures"),
    ({"count": 0}, "pictures"),
    ({"steps": 0}, "steps"),
    ({"steps": 251}, "steps"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"scale": 1e6}, "guidance"),
    ({"scale": float("nan")}, "guidance"),
    ({"power": -1.0}, "power"),
    ({"method": "ode_heun"}, "sampler"),
    ({"labels": ()}, "class"),
    ({"labels": (99,)}, "labels"),
  ],
)
def test_settings_out_of_range_are_refused(engine, changes, setting):
  with pytest.raises(SettingError) as caught:
    engine.draw(dataclasses.replace(engine.defaults(), **changes))
  assert caught.value.setting == setting


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_nothing_or_all_is_refused(engine, value):
  with pytest.raises(SettingError) as caught:
    engine.inpaint(engine.defaults(), PICTURE, np.full((8, 8), value))
  assert caught.value.setting == "mask"


def test_classes_have_the_names_of_the_data():
  engine = make_engine(**{"model.num_classes": 3})
  engine.pipeline.experiment.data_labels = DataLabels(np.array([0, 2]), ["ant", "bee"])
  assert engine.classes() == [("0 ant", 0), ("2 bee", 2), (ANY_CLASS, None)]


def test_classes_of_imagenet_have_all_their_names():
  classes = make_engine(**{"model.num_classes": 1000}).classes()
  assert len(classes) == 1001
  assert ("207 golden retriever", 207) in classes


def test_a_network_without_null_label_is_not_guided():
  engine = make_engine(**{"model.label_dropout": 0.0, "sampling.cfg_scale": 1.0})
  assert not engine.is_guided
  assert engine.classes()[-1] == ("9", 9)
  assert engine.defaults().scale == 1
  *_, last = engine.draw(engine.defaults())
  assert last.images.shape == (4, 8, 8, 1)


def test_a_run_of_another_sampler_starts_with_a_stepwise_one():
  engine = make_engine(
    **{
      "diffusion.process": "flow",
      "diffusion.variance": "fixed_large",
      "sampling.method": "sde",
      "sampling.arguments": {"norm": 0.5},
    }
  )
  assert engine.defaults().method == "heun"
  assert engine.methods() == ["euler", "heun", "dpm++", "dpm++sde"]
  assert engine.code(engine.defaults())[1]  # the arguments of sde do not reach heun
  _ = engine.draw(engine.defaults())


def test_scales_follow_the_schedule(engine):
  settings = dataclasses.replace(engine.defaults(), scale=3.0, power=4.0)
  scales = engine.scales(settings)
  assert scales[0] == pytest.approx(1, abs=1e-4)
  assert scales[-1] == pytest.approx(3, abs=1e-4)
  assert (np.diff(scales) >= -1e-6).all()
  constant = engine.scales(dataclasses.replace(settings, power=0.0))
  np.testing.assert_allclose(constant, 3, rtol=1e-6)


def test_the_shown_code_draws_the_same_pictures(tmp_path):
  folder = save_tiny(tmp_path / "run")
  pipeline = mdt_jax.Pipeline.from_checkpoint(folder)
  engine = Engine(pipeline, Source(str(folder)))
  settings = dataclasses.replace(
    engine.defaults(), labels=(3, None), count=2, seed=5, scale=2.5, power=0.0
  )
  *_, last = engine.draw(settings)
  shell, python = engine.code(settings)
  found = {}
  exec(python.replace("picture.png", str(tmp_path / "picture.png")), found)
  drawn = np.stack([np.asarray(picture) for picture in found["pictures"]])
  assert np.abs(drawn.astype(int) - last.images[..., 0]).max() <= 1
  words = shlex.split(shell.replace("\\\n", " "))
  assert words[:3] == ["python", "-m", "mdt_jax.sample"]
  code, _, err = run_command("mdt_jax.sample", *words[3:], folder=tmp_path)
  assert code == 0, err
  with np.load(tmp_path / "pictures" / "samples.npz") as file:
    assert np.abs(file["arr_0"].astype(int) - last.images).max() <= 1


def test_the_shown_command_quotes_a_folder(engine):
  engine = Engine(engine.pipeline, Source("my runs/a", step=3, vae="none"))
  shell, python = engine.code(engine.defaults())
  assert "--checkpoint='my runs/a'" in shell
  assert re.search(r"--step=3 --vae=none", shell)
  assert "from_checkpoint('my runs/a', step=3, vae='none')" in python
