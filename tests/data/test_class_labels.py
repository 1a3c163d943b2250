"""The labels that data holds: found in a source, stored in a run, drawn by default."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mdt_jax.data.class_labels import FILE, DataLabels
from mdt_jax.data.digits import DigitsSource
from mdt_jax.data.examples import Subset
from mdt_jax.data.latents import open_set
from mdt_jax.data.memory import MemorySource
from mdt_jax.errors import SettingError
from mdt_jax.evaluation import job
from mdt_jax.experiment import build
from mdt_jax.sampling.conditions import choose_conditions
from mdt_jax.sampling.labels import choose_labels, parse_labels
from mdt_jax.sampling.pipeline import Pipeline
from mdt_jax.training import loop
from mdt_jax.training.sample_pictures import Pictures
from tests.data.folders import open_folder, write_image
from tests.data.sets import NUM_CLASSES, Images, write
from tests.training.tiny import tiny_dit_config


def two_classes(folder):
  for i in range(3):
    write_image(folder / f"ant/{i}.png", i)
  write_image(folder / "bee/0.png")
  (folder / "cow").mkdir()
  return open_folder(folder)


def test_folder_holds_the_classes_that_have_images(tmp_path):
  found = DataLabels.of(two_classes(tmp_path))
  assert found.labels.tolist() == [0, 1]
  assert list(found.names) == ["ant", "bee"]
  assert found.describe() == "2 classes of 1 to 3 images: ant, bee"


def test_validation_examples_keep_the_names(tmp_path):
  found = DataLabels.of(Subset(two_classes(tmp_path), np.array([0, 1])))
  assert list(found.names) == ["ant", "bee"]


@pytest.mark.parametrize(
  ("names", "expected"),
  [
    (["0", "1", "10", "2"], "Class 10 has the label 2"),
    (["1", "2", "3"], None),
    (["01", "02", "10"], None),
    (["1", "10", "2", "ant"], None),
    ([], None),
  ],
)
def test_numbers_in_the_order_of_texts_are_warned_of(warnings, names, expected):
  DataLabels(np.arange(len(names) or 3), names).warn_of_order()
  assert len(warnings) == (expected is not None)
  assert expected is None or expected in warnings[0]


def test_training_warns_of_numbers_in_the_order_of_texts(tmp_path, warnings):
  for name in ("1", "10", "2"):
    write_image(tmp_path / f"{name}/0.png", mode="L")
  changes = {"data.source": "images", "data.path": str(tmp_path)}
  build(tiny_dit_config(**changes)).open()
  assert any("Class 10 has the label 1" in line for line in warnings)


def test_arrays_hold_the_labels_that_occur():
  source = MemorySource(np.zeros((3, 2, 2, 1), np.uint8), [4, 1, 4], num_classes=9)
  found = DataLabels.of(source)
  assert found.labels.tolist() == [1, 4]
  assert found.describe() == "2 classes of 1 to 2 images"


def test_largest_label_takes_no_memory():
  source = MemorySource(np.zeros((2, 2, 2, 1), np.uint8), [0, 2**31 - 1])
  assert DataLabels.of(source).labels.tolist() == [0, 2**31 - 1]


def test_latent_set_holds_the_labels_in_its_card(tmp_path):
  # Images 4, 9, 14 and 19 are those of class 4.
  write(tmp_path, Images(unreadable=range(4, 24, 5)))
  found = DataLabels.of(open_set(tmp_path))
  assert found.labels.tolist() == [0, 1, 2, 3]
  assert found.counts is not None
  assert found.counts.tolist() == [5, 5, 5, 5]
  assert found.describe() == "4 classes of 5 images: class 0, class 1, class 2, …"


def test_latent_set_of_an_earlier_version_holds_all_its_classes(tmp_path):
  write(tmp_path)
  card = json.loads((tmp_path / "card.json").read_text())
  for shard in card["shards"]:
    del shard["labels"]
  (tmp_path / "card.json").write_text(json.dumps(card))
  assert DataLabels.of(open_set(tmp_path)).labels.tolist() == list(range(NUM_CLASSES))


def test_source_without_counts_holds_every_label():
  class Own:
    num_classes = 3

  found = DataLabels.of(Own())  # pyright: ignore[reportArgumentType]
  assert found.labels.tolist() == [0, 1, 2]
  assert found.describe() == "3 classes"


def test_stored_labels_are_read_back(tmp_path):
  DataLabels(np.array([1, 4]), ["ant", "caf\udce9"]).write(tmp_path)
  found = DataLabels.read(tmp_path, 5)
  assert found is not None
  assert found.labels.tolist() == [1, 4]
  assert list(found.names) == ["ant", "caf\udce9"]
  assert DataLabels.read(tmp_path / "other", 5) is None


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{}",
    '{"labels": []}',
    '{"labels": ["0"]}',
    '{"labels": [1, 1]}',
    '{"labels": [2, 1]}',
    '{"labels": [-1]}',
    '{"labels": [5]}',
    '{"labels": [1e400]}',
    '{"labels": [true]}',
    '{"labels": [0], "names": ["a", "b"]}',
    '{"labels": [0], "names": 7}',
    "[" * 100_000,
  ],
)
def test_damaged_labels_are_refused_in_one_line(tmp_path, text):
  (tmp_path / FILE).write_text(text)
  with pytest.raises(SettingError, match=f"path = .*{FILE}") as caught:
    DataLabels.read(tmp_path, 5)
  assert len(str(caught.value).splitlines()) == 1


HELD = DataLabels(np.array([2, 5]), ["ant", "Bee"])


def test_default_labels_are_those_of_the_data():
  balanced = choose_labels("labels", ["balanced"], None, 10, 0, held=HELD)
  assert balanced.tolist() == [2, 5]
  drawn = choose_labels("labels", ["random"], 50, 10, 0, held=HELD)
  assert set(drawn.tolist()) == {2, 5}


@pytest.mark.parametrize("how", ["balanced", "random"])
def test_draws_are_the_same_where_the_data_holds_every_class(how):
  held = DataLabels(np.arange(10))
  drawn = choose_labels("labels", [how], 50, 10, 3, held=held)
  before = choose_labels("labels", [how], 50, 10, 3)
  np.testing.assert_array_equal(drawn, before)
  assert drawn.dtype == before.dtype


def test_names_of_the_data_are_labels():
  labels = parse_labels("labels", ["Bee", "ANT", 7, "3"], 10, held=HELD)
  assert labels.tolist() == [5, 2, 7, 3]
  with pytest.raises(SettingError, match=r"labels = 'cow': .* ant, Bee; .* 0 … 9"):
    parse_labels("labels", ["cow"], 10, held=HELD)


def test_names_of_the_data_come_before_those_of_imagenet():
  held = DataLabels(np.arange(2), ["ant", "tench"])
  assert parse_labels("labels", ["tench"], 1000, held=held).tolist() == [1]
  with pytest.raises(SettingError, match="golden retriever"):
    parse_labels("labels", ["golden retriever"], 1000, held=held)


def test_imagenet_folders_accept_names_of_imagenet():
  held = DataLabels(np.arange(1000), [f"n{i:08d}" for i in range(1000)])
  found = parse_labels("labels", ["golden retriever", "n00000003"], 1000, held=held)
  assert found.tolist() == [207, 3]


def test_class_may_have_a_long_number_as_its_name():
  held = DataLabels(np.arange(2), ["9" * 20, "bee"])
  assert parse_labels("labels", ["9" * 20], 2, held=held).tolist() == [0]


def test_same_name_of_two_classes_is_ambiguous():
  held = DataLabels(np.arange(3), ["Ant", "ANT", "bee"])
  assert parse_labels("labels", ["ANT"], 10, held=held).tolist() == [1]
  with pytest.raises(SettingError, match=r"0 \(Ant\) or 1 \(ANT\)"):
    parse_labels("labels", ["ant"], 10, held=held)


def test_caption_has_number_and_name():
  held = DataLabels(np.array([2, 5, 6]), ["ant", "5", "caf\udce9"])
  captions = [held.caption(label) for label in (2, 5, 6, 7)]
  assert captions == ["2 ant", "5", "6 caf\\udce9", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of 4 digits with labels 2 and 5, of 10 classes, and its log."""
  digits = DigitsSource()
  images = np.stack([digits[i]["image"] for i in range(8)])
  names = ["", "", "ant", "", "", "bee", *[""] * 4]
  source = MemorySource(images, np.repeat([2, 5], 4), 10, names)
  workdir = tmp_path_factory.mktemp("run")
  lines = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.logger, "warning", lambda text, *a: lines.append(text % a))
    loop.train(tiny_dit_config(num_steps=2), workdir, source=source)
  return workdir, lines


def test_run_warns_of_classes_without_images(run):
  _, lines = run
  assert any("2 of the 10 classes of config.model.num_classes" in x for x in lines)


def test_samples_of_a_run_have_labels_of_its_data(run):
  pipeline = Pipeline.from_checkpoint(run[0])
  held = pipeline.experiment.data_labels
  assert held is not None
  assert held.labels.tolist() == [2, 5]
  assert pipeline.job(["bee", "ant"]).request.labels.tolist() == [5, 2]
  drawn = choose_conditions(pipeline.model.conditioning, 3, held)
  assert drawn.y.tolist() == drawn.labels.tolist() == [2, 5, 2]


def test_scores_of_a_run_have_labels_of_its_data(run):
  experiment = job.load_run(run[0]).experiment
  drawn = job.draw_images(experiment, None, None, ["frechet"], 5, seed=0)
  assert drawn.labels.tolist() == [2, 5, 2, 5, 2]
  drawn = job.draw_images(experiment, None, None, ["fid"], 100, seed=0)
  assert set(drawn.labels) == {2, 5}


def test_training_pictures_have_labels_and_names_of_the_data(tmp_path):
  images = np.zeros((4, 8, 8, 1), np.uint8)
  source = MemorySource(images, [1, 3, 3, 1], 4, ["ant", "bee", "cow", "dog"])
  experiment = build(tiny_dit_config(sample_every=1), source=source)
  experiment.open()
  pictures = Pictures(experiment, tmp_path)
  assert pictures._labels.tolist() == [1, 3, 1, 3]
  assert pictures._captions == ["1 bee", "3 dog", "1 bee", "3 dog"]


def test_run_without_the_record_draws_all_labels(run, tmp_path):
  (tmp_path / "checkpoints").symlink_to(run[0] / "checkpoints")
  experiment = Pipeline.from_checkpoint(tmp_path).experiment
  assert experiment.data_labels is None
  drawn = choose_conditions(experiment.model.conditioning, 12, None)
  assert drawn.y.tolist() == [*range(10), 0, 1]
