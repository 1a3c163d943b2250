"""relation_scores: exact scores of images of the source relations."""

from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.data.relations import Relations, RelationsSource
from mdt_jax.errors import SettingError
from mdt_jax.evaluation.evaluator import Evaluator
from mdt_jax.evaluation.relation_scores import (
  NAMES,
  chance,
  check_score,
  relation_score,
)

COUNT = 10_000
RELATIONS = Relations(
  grid=6,
  glyph_size=2,
  glyphs=4,
  near_pairs=2,
  far_pairs=2,
  mirrored_rows=1,
  sums=2,
  counts=1,
)
KINDS = RELATIONS.kinds
SOURCE = RelationsSource(RELATIONS)


@pytest.fixture(scope="module")
def cells():
  """Glyphs of real images, (COUNT, G, G)."""
  return RELATIONS.draw(np.random.default_rng(0), COUNT)


@pytest.fixture(scope="module")
def uniform():
  """Images of uniform glyphs."""
  rng = np.random.default_rng(1)
  return RELATIONS.render(rng.integers(4, size=(COUNT, 6, 6)))


@pytest.mark.parametrize("name", [*KINDS, "valid_cells"])
def test_real_images_score_one(cells, name):
  assert relation_score(name, SOURCE, RELATIONS.render(cells)) == 1


@pytest.mark.parametrize("name", KINDS)
def test_uniform_images_score_at_chance(uniform, name):
  expected = chance(name, RELATIONS)
  number = COUNT * len(RELATIONS.cells[name])
  error = np.sqrt(expected * (1 - expected) / number)
  assert abs(relation_score(name, SOURCE, uniform) - expected) < 3 * error


@pytest.mark.parametrize("name", ["near_pairs", "far_pairs", "mirrored_rows"])
def test_pairs_fall_by_the_share_of_spoilt_cells(cells, name):
  rng = np.random.default_rng(2)
  spoilt = rng.random(cells.shape) < 0.2
  drawn = np.where(spoilt, rng.integers(4, size=cells.shape), cells)
  found = relation_score(name, SOURCE, RELATIONS.render(drawn))
  expected = 0.8**2 + (1 - 0.8**2) / 4  # both cells are whole, or equal by chance
  number = COUNT * len(RELATIONS.cells[name])
  assert abs(found - expected) < 3 * np.sqrt(expected * (1 - expected) / number)


def test_grey_cells_are_not_valid(cells):
  images = RELATIONS.render(cells).astype(np.float32)
  images[:, :2, :2] = 127.5  # the first of 36 cells
  assert relation_score("valid_cells", SOURCE, images) == pytest.approx(35 / 36)


def test_mixture_of_two_glyphs_is_not_valid():
  first, second = (
    RELATIONS.render(np.full((1, 6, 6), glyph)).astype(np.float32) for glyph in (1, 2)
  )
  assert relation_score("valid_cells", SOURCE, (first + second) / 2) == 0


@pytest.mark.parametrize("pixel", [127.5, np.nan])
@pytest.mark.parametrize("name", KINDS)
def test_cells_without_a_nearest_glyph_break_their_relations(name, pixel):
  images = np.full((3, 12, 12, 1), pixel, np.float32)
  assert relation_score(name, SOURCE, images) == 0


def test_no_image_is_refused():
  with pytest.raises(SettingError) as error:
    relation_score("sums", SOURCE, np.zeros((0, 12, 12, 1)))
  assert error.value.setting == "images"


def test_entropy_is_near_one_for_uniform_cells_and_zero_for_one_image(uniform):
  assert relation_score("free_entropy", SOURCE, uniform) == pytest.approx(1, abs=1e-3)
  same = np.repeat(uniform[:1], 50, axis=0)
  assert relation_score("free_entropy", SOURCE, same) == 0


def test_entropy_of_two_equally_frequent_glyphs_is_half():
  glyphs = np.repeat([0, 3], 10)[:, None, None] * np.ones((20, 6, 6), int)
  assert relation_score("free_entropy", SOURCE, RELATIONS.render(glyphs)) == 0.5


def test_copies_of_training_images_are_found():
  scarce = RelationsSource(RELATIONS, num_images=30)
  known = np.stack([scarce[index]["image"] for index in range(30)])
  assert relation_score("nearest_cells", scarce, known[[3, 17]]) == 1
  cells = scarce.all_cells[3].copy()
  cells[:9] = (cells[:9] + 1) % 4  # a quarter of the cells
  image = RELATIONS.render(cells.reshape(1, 6, 6))
  assert relation_score("nearest_cells", scarce, image) == 0.75


def test_relation_counts_in_images_whose_label_asks_for_it(cells):
  labelled = RelationsSource(RELATIONS, labels=True)
  images = RELATIONS.render(cells[:2])
  images[1] = RELATIONS.render(np.roll(cells[1], 1, axis=1))
  only_first = np.array([1, 0])  # near_pairs, none
  assert relation_score("near_pairs", labelled, images, only_first) == 1
  with pytest.raises(SettingError) as error:
    relation_score("sums", labelled, images, only_first)
  assert (error.value.setting, error.value.value) == ("num_images", 2)
  with pytest.raises(SettingError) as error:
    relation_score("sums", labelled, images, np.array([1, 99]))
  assert error.value.setting == "images"


def test_labels_are_needed_where_the_data_has_labels(uniform):
  labelled = RelationsSource(RELATIONS, labels=True)
  with pytest.raises(SettingError) as error:
    relation_score("sums", labelled, uniform)
  assert error.value.setting == "metrics"


@pytest.mark.parametrize("name", ["mirrored_rows", "nearest_cells"])
def test_score_that_the_data_lacks_is_refused(name):
  with pytest.raises(SettingError) as error:
    check_score(name, RelationsSource(Relations()))
  assert (error.value.setting, error.value.value) == ("metrics", name)


class Images:
  """An `ImageStream` of arrays."""

  def __init__(self, images):
    self._images = images

  def __len__(self):
    return len(self._images)

  def batches(self, batch_size):
    for start in range(0, len(self), batch_size):
      batch = self._images[start : start + batch_size]
      yield batch, np.zeros(len(batch), np.int32)


def test_evaluator_asks_the_data_of_the_run(cells):
  source = RelationsSource(RELATIONS, num_images=20)
  evaluate = Evaluator.create(NAMES, open_data=lambda: source, batch_size=50)
  found = evaluate(Images(RELATIONS.render(cells[:100])))
  assert list(found) == list(NAMES)
  assert found["sums"] == found["valid_cells"] == 1
  assert 0.4 < found["nearest_cells"] < 1


def test_evaluator_checks_the_labels_to_be_drawn():
  labelled = RelationsSource(RELATIONS, labels=True)
  evaluate = Evaluator.create(
    ["sums"], open_data=lambda: labelled, prefix="config.eval."
  )

  class Drawn:
    labels, image_shape = np.zeros(4, np.int32), (12, 12, 1)

  with pytest.raises(SettingError) as error:
    evaluate.check(Drawn())
  assert error.value.setting == "config.eval.num_images"


def test_evaluator_refuses_relations_without_a_run():
  with pytest.raises(SettingError) as error:
    Evaluator.create(["sums"], prefix="config.eval.")
  assert error.value.setting == "config.eval.metrics"


def test_evaluator_refuses_relations_of_other_data():
  from mdt_jax.data.digits import DigitsSource

  with pytest.raises(SettingError) as error:
    Evaluator.create(["sums"], open_data=DigitsSource)
  assert (error.value.setting, error.value.value) == ("metrics", "sums")
