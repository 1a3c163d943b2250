"""Conditions given as arrays: forms, errors, negative conditions, files."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mdt_jax import Pipeline, SettingError
from mdt_jax.data.conditions import with_condition
from mdt_jax.data.memory import MemorySource
from mdt_jax.experiment import build
from mdt_jax.models import (
  JointCondition,
  LabelCondition,
  TokensCondition,
  VectorCondition,
)
from mdt_jax.sampling.conditions import (
  choose_conditions,
  count_images,
  make_conditions,
  make_null,
  read_conditions,
  repeat_arrays,
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
  found = make_conditions(BOTH, [3, 4], ONE, 10)
  label, vector = BOTH.split(found.y)
  np.testing.assert_array_equal(label, [3, 4])
  np.testing.assert_array_equal(vector[:, :3], [ONE] * 2)
  assert found.labels.tolist() == [3, 4]


def test_null_label_beside_a_vector_needs_drops_apart():
  """Trained together, the network has never seen a vector without its label."""
  apart = JointCondition((LABEL, VECTOR), together=False)
  assert make_conditions(apart, [3, None], ONE, 10).labels.tolist() == [3, 10]
  assert make_conditions(apart, None, ONE, 10).labels.tolist() == [10]
  for labels in (None, [3, None]):
    with pytest.raises(SettingError) as error:
      make_conditions(BOTH, labels, ONE, 10)
    assert error.value.setting == "labels"


def test_label_beside_a_lone_vector_names_the_class():
  found = make_conditions(VECTOR, None, {"clip": ONE, "label": [3, 4]}, 10)
  assert found.labels.tolist() == [3, 4] and found.y.shape == (2, 4)


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
    (VECTOR, None, {3: ONE}, "condition", "is missing; the arrays given are: 3"),
    (VECTOR, None, {"clip": ONE, "t5": ONE}, "condition", "is unknown"),
    (VECTOR, None, {"clip": np.ones((2, 4))}, "condition", r"\(N, 3\), has \(2, 4\)"),
    (VECTOR, None, "prompts.npz", "condition", r"\(N, 3\), has \(\)"),
    (
      VECTOR,
      None,
      {"clip": [0, 1e300, 1]},
      "condition",
      r"is inf at \(0, 1\)",
    ),
    (
      BOTH,
      None,
      {"clip": ONE, "label": [1, -1]},
      "condition",
      "-1 labels of this",
    ),
    (BOTH, [10], ONE, "labels", "drops its conditions together"),
    (BOTH, None, {"clip": ONE, "label": [10]}, "condition", "drops its conditions tog"),
    (VECTOR, None, {"clip": [0, np.nan, 1]}, "condition", "finite"),
    (VECTOR, None, {"clip": ["a", "b", "c"]}, "condition", "numbers"),
    (VECTOR, None, {"clip": [[1, 2, 3], [1, 2]]}, "condition", "array of numbers"),
    (VECTOR, None, {"clip": ONE, "caption": [["a"]]}, "condition", "texts"),
    (VECTOR, None, {"clip": ONE, "caption": b"a"}, "condition", "texts"),
    (BOTH, [1], {"clip": ONE, "label": [1]}, "labels", "beside"),
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
  file = {"label": np.array([3])}
  np.testing.assert_array_equal(make_null(LABEL, file, 2, 10), [3, 3])
  assert make_null(VECTOR, ONE, 2, 10).shape == (2, 4)
  assert make_null(VECTOR, None, 2, 10) is None
  with pytest.raises(SettingError, match="all 2") as error:
    make_null(LABEL, [1, 2, 3], 2, 10)
  assert error.value.setting == "null"
  with pytest.raises(SettingError, match="must be given") as error:
    make_null(BOTH, {"clip": ONE}, 2, 10)  # never trained without a label
  assert error.value.setting == "null"
  assert make_null(BOTH, {"clip": ONE, "label": 3}, 2, 10).shape[0] == 2


@pytest.mark.parametrize(
  ("arrays", "count"),
  [
    ({"clip": ONE}, 1),
    ({"clip": ONE, "caption": np.array("a")}, 1),
    ({"clip": np.ones((4, 3)), "caption": np.array("a")}, 4),
    ({"clip": ONE, "label": np.arange(5)}, 5),
  ],
)
def test_arrays_are_counted_and_repeated(arrays, count):
  assert count_images(BOTH, arrays) == count
  repeated = repeat_arrays(BOTH, arrays, 6)
  found = make_conditions(BOTH, None if "label" in arrays else [1] * 6, repeated, 10)
  assert len(found.y) == 6


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


def make_source(count=20, **more):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
  vectors = rng.standard_normal((count, 3)).astype(np.float32)
  arrays = {"clip": vectors, "text": np.array(["a"] * count), **more}
  return MemorySource(images, np.arange(count) % 10, 10, arrays=arrays)


def vector_experiment(source=None, **settings):
  changes = {
    "model.condition": "vector",
    "model.label_dropout": 0.1,
    "condition.vector": "clip",
    "condition.vector_size": 3,
    **settings,
  }
  config = tiny_dit_config()
  config.update_from_flattened_dict(changes)
  return build(config, source=source or make_source())


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


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_captions_of_the_data_are_shown(validation):
  texts = np.array([f"image {i}" for i in range(20)])
  experiment = vector_experiment(
    source=make_source(caption=texts), **{"data.validation": validation}
  )
  found = choose_conditions(
    experiment.model.conditioning, 3, None, open_data=lambda: experiment.source
  )
  rows = [
    np.flatnonzero(
      (np.stack([make_source()[i]["clip"] for i in range(20)]) == v).all(1)
    )
    for v in found.arrays["clip"]
  ]
  assert list(found.captions) == [f"image {int(row[0])}" for row in rows]


def test_mask_of_some_examples_alone_is_refused():
  class Some:
    num_classes, image_shape = 1, (8, 8, 1)

    def __len__(self):
      return 2

    def __getitem__(self, index):
      mask = {"t5_mask": np.ones(2)} if index else {}
      image = np.zeros((8, 8, 1), np.uint8)
      return {"image": image, "label": 0, "t5": np.ones((2, 4)), **mask}

  source = with_condition(Some(), TOKENS)
  assert set(source[0]) == {"image", "label", "t5"}
  with pytest.raises(SettingError, match="only if, example 0") as error:
    source[1]
  assert error.value.setting == "config.condition.tokens"


def test_held_out_data_is_read_one_example_at_a_time():
  source = with_condition(make_source(), VECTOR)
  endless = itertools.chain([3], itertools.repeat(0))
  assert source.first_readable(endless)["label"] == 3


def test_examples_hold_the_arrays_of_the_condition_alone():
  assert set(vector_experiment().source[0]) == {"image", "label", "clip"}


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"condition.vector": "t5"}, "its arrays are: clip, text"),
    (
      {"condition.vector_size": 4},
      r"\(3,\), and .*vector_size says \(4,\)",
    ),
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


def test_other_labels_beside_a_vector_are_another_job(pipeline):
  two = np.stack([ONE, -ONE])
  described = [
    pipeline.job(condition={"clip": two, "label": labels}).describe()
    for labels in ([0, 1], [1, 0])
  ]
  assert described[0].pop("classes") != described[1].pop("classes")
  assert described[0] == described[1]
