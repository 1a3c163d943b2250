"""Conditions given as arrays: forms, errors, negative conditions, files."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax import Pipeline, SettingError
from mdt_jax.data.memory import MemorySource
from mdt_jax.experiment import build
from mdt_jax.models import (
  JointCondition,
  LabelCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.models.registry import init_params
from mdt_jax.sampling.conditions import (
  choose_conditions,
  make_conditions,
  make_null,
  read_conditions,
)
from tests import reference
from tests.training.tiny import tiny_dit_config

LABEL = LabelCondition(10, 0.1)
VECTOR = VectorCondition("clip", 3, 0.1)
TOKENS = TokensCondition("t5", 2, 4, 0.1)
BOTH = JointCondition((LABEL, VECTOR))
ONE = np.arange(3.0)


def test_one_array_serves_one_image():
  found = make_conditions(VECTOR, None, ONE, 10)
  np.testing.assert_array_equal(found.y, [[0, 1, 2, 1]])
  assert (found.labels, list(found.captions)) == (None, [""])


def test_arrays_and_captions_of_several_images():
  arrays = {"clip": np.stack([ONE, ONE + 1]), "caption": np.array(["a", "b"])}
  found = make_conditions(VECTOR, None, arrays, 10)
  np.testing.assert_array_equal(found.y, [[0, 1, 2, 1], [1, 2, 3, 1]])
  assert list(found.captions) == ["a", "b"]


def test_mask_marks_padding():
  tokens = np.ones((3, 2, 4))
  found = make_conditions(TOKENS, None, {"t5": tokens, "t5_mask": [[1, 0]] * 3}, 10)
  np.testing.assert_array_equal(found.y[:, 1], 0)
  np.testing.assert_array_equal(found.y[:, 0], 1)


def test_labels_join_arrays():
  found = make_conditions(BOTH, [3, None], ONE, 10)
  label, vector = BOTH.split(found.y)
  np.testing.assert_array_equal(label, [3, 10])
  np.testing.assert_array_equal(vector[:, :3], [ONE] * 2)
  assert found.labels.tolist() == [3, 10]


def test_labels_may_stand_among_the_arrays():
  found = make_conditions(BOTH, None, {"clip": ONE, "label": np.array([3, 4])}, 10)
  assert found.labels.tolist() == [3, 4]


@pytest.mark.parametrize(
  ("condition", "labels", "arrays", "setting", "match"),
  [
    (LABEL, 3, ONE, "condition", "class labels alone"),
    (VECTOR, None, None, "condition", "needs 'clip'"),
    (VECTOR, 3, ONE, "labels", "no class labels"),
    (VECTOR, None, np.ones(4), "condition", "shape"),
    (VECTOR, None, np.ones((0, 3)), "condition", "shape"),
    (VECTOR, None, {"t5": ONE}, "condition", "is missing; the arrays given are: t5"),
    (VECTOR, None, {"clip": ONE, "t5": ONE}, "condition", "is unknown"),
    (VECTOR, None, {"clip": [0, np.nan, 1]}, "condition", "finite"),
    (VECTOR, None, {"clip": ["a", "b", "c"]}, "condition", "numbers"),
    (BOTH, [1, 2, 3], np.ones((2, 3)), "condition", "2 images, others for 3"),
    (BOTH, 11, ONE, "labels", "0 … 9"),
  ],
)
def test_bad_arrays_are_named(condition, labels, arrays, setting, match):
  with pytest.raises(SettingError, match=match) as error:
    make_conditions(condition, labels, arrays, 10)
  assert error.value.setting == setting


def test_negative_condition_serves_all_images():
  np.testing.assert_array_equal(make_null(LABEL, 3, 2, 10), [3, 3])
  assert make_null(VECTOR, ONE, 2, 10).shape == (2, 4)
  assert make_null(VECTOR, None, 2, 10) is None
  with pytest.raises(SettingError, match="all 2") as error:
    make_null(LABEL, [1, 2, 3], 2, 10)
  assert error.value.setting == "null"


# Files.


def test_file_of_conditions_is_read(tmp_path):
  path = tmp_path / "prompts.npz"
  np.savez(path, clip=ONE, caption=np.array(["a cat"]))
  found = read_conditions("condition", path)
  np.testing.assert_array_equal(found["clip"], ONE)
  assert found["caption"].tolist() == ["a cat"]


@pytest.mark.parametrize("kind", ["text", "pickle", "empty"])
def test_damaged_file_of_conditions_is_refused(tmp_path, kind):
  path = tmp_path / "prompts.npz"
  if kind == "text":
    path.write_text("no archive")
  elif kind == "pickle":
    np.savez(path, clip=np.array([{}], object))
  else:
    np.savez(path)
  with pytest.raises(SettingError) as error:
    read_conditions("condition", path)
  assert (error.value.setting, error.value.value) == ("condition", str(path))


# Chosen from the data.


def make_source(count=20):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
  vectors = rng.standard_normal((count, 3)).astype(np.float32)
  arrays = {"clip": vectors, "text": np.array(["a"] * count)}
  return MemorySource(images, np.arange(count) % 10, 10, arrays=arrays)


def vector_experiment(**settings):
  changes = {
    "model.condition": "vector",
    "model.label_dropout": 0.1,
    "condition.vector": "clip",
    "condition.vector_size": 3,
    **settings,
  }
  config = tiny_dit_config()
  config.update_from_flattened_dict(changes)
  return build(config, source=make_source())


def test_training_draws_conditions_of_the_data():
  experiment = vector_experiment()
  found = choose_conditions(
    experiment.model.conditioning, 5, None, open_data=lambda: experiment.source
  )
  rows = np.linspace(0, 19, 5).astype(int)
  vectors = np.stack([make_source()[int(row)]["clip"] for row in rows])
  np.testing.assert_array_equal(found.y[:, :3], vectors)
  assert found.labels.tolist() == (rows % 10).tolist()
  np.testing.assert_array_equal(found.arrays["clip"], vectors)


def test_examples_hold_the_arrays_of_the_condition_alone():
  assert set(vector_experiment().source[0]) == {"image", "label", "clip"}


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"condition.vector": "t5"}, "its arrays are: clip, text"),
    ({"condition.vector_size": 4}, r"shape \(4,\), has \(3,\)"),
    ({"condition.vector": "text", "condition.vector_size": 3}, "shape"),
    ({"condition.tokens_size": 3}, "has no effect"),
    ({"condition.drop": "apart"}, "has no effect"),
    ({"model.condition": "label"}, "has no effect"),
  ],
)
def test_conditions_that_do_not_fit_the_data_are_named(settings, match):
  with pytest.raises(SettingError, match=match) as error:
    _ = vector_experiment(**settings).source
  assert error.value.setting.startswith("config.condition")


# Pipelines.


@pytest.fixture(scope="module")
def pipeline():
  experiment = vector_experiment()
  params = reference.random_params(experiment.model)
  return Pipeline(experiment, params, 0)


def test_condition_changes_the_image_and_null_too(pipeline):
  options = dict(num_steps=4, cfg_scale=9.0, cfg_power=0.0, batch_size=2)
  two = np.stack([ONE, -ONE])
  first = pipeline.draw(condition=two, **options)
  alone = pipeline.draw(condition={"clip": ONE}, **options)
  # Other sizes of a block compile another program, which may round differently.
  assert np.abs(first[0].astype(int) - alone[0]).max() <= 1
  plain = dict(num_steps=2, cfg_scale=1.0)
  one, other = (pipeline.draw(condition=c, **plain).astype(int) for c in (ONE, -ONE))
  assert np.abs(one - other).max() > 5
  negative = pipeline.draw(condition=two, null=-ONE, **options)
  assert np.abs(negative.astype(int) - first).max() > 2
  # An image that leads away from its own condition is not guided.
  unguided = pipeline.draw(condition=two, num_steps=4, cfg_scale=1.0, batch_size=2)
  assert np.abs(negative[1].astype(int) - unguided[1]).max() <= 1


def test_null_needs_guidance(pipeline):
  with pytest.raises(SettingError, match="no null condition") as error:
    pipeline.job(condition=ONE, null=ONE, cfg_scale=1.0)
  assert error.value.setting == "null"


def test_written_images_have_captions_and_no_labels(pipeline, tmp_path):
  arrays = {"clip": np.stack([ONE, -ONE]), "caption": np.array(["up", "down"])}
  file = pipeline.write(
    tmp_path, condition=arrays, num_steps=2, png=True, progress=False
  )
  with np.load(file) as found:
    assert set(found) == {"arr_0"} and found["arr_0"].shape == (2, 8, 8, 1)
  assert sorted(p.name for p in (tmp_path / "png").iterdir()) == [
    "0_000000.png",
    "0_000001.png",
  ]
  assert pipeline.write(tmp_path, condition=arrays, num_steps=2) == file  # resumes
  with pytest.raises(SettingError, match="labels"):
    pipeline.write(tmp_path, condition=ONE, num_steps=2)


def test_initial_network_ignores_its_vector():
  experiment = vector_experiment()
  pipeline = Pipeline(experiment, init_params_of(experiment), 0)
  two = pipeline.draw(condition=np.stack([ONE, -ONE]), num_steps=1, cfg_scale=1.0)
  other = pipeline.draw(condition=np.stack([-ONE, ONE]), num_steps=1, cfg_scale=1.0)
  np.testing.assert_array_equal(two, other)


def init_params_of(experiment):
  import jax

  return init_params(experiment.model, jax.random.key(0))
