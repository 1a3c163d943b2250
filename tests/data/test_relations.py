"""RelationsSource: generated images whose parts obey exact relations."""

from __future__ import annotations

import numpy as np
import pytest

import mdt_jax
from mdt_jax.config import default_config
from mdt_jax.data.examples import SourceArguments
from mdt_jax.data.relations import (
  ENDLESS,
  KINDS,
  Relations,
  RelationsSource,
  open_relations,
)
from mdt_jax.data.sources import create_source
from mdt_jax.errors import SettingError

SMALL = Relations()
LARGE = Relations(
  grid=9,
  glyph_size=2,
  glyphs=3,
  near_pairs=4,
  far_pairs=4,
  mirrored_rows=3,
  sums=2,
  counts=2,
  counted=3,
  shift=1,
)
ALL = pytest.mark.parametrize("relations", [SMALL, LARGE], ids=["small", "large"])


def images(source, count):
  return np.stack([source[index]["image"] for index in range(count)])


def open_with(arguments, image_size=16, channels=1):
  return open_relations(
    SourceArguments("", "train", image_size, channels, 0, arguments=arguments)
  )


@ALL
def test_glyphs_are_orthogonal(relations):
  rows = relations.patterns.reshape(relations.glyphs, -1)
  size = relations.glyph_size**2
  np.testing.assert_array_equal(rows @ rows.T, size * np.eye(relations.glyphs))


@ALL
def test_cells_of_relations_are_disjoint_and_cover_the_grid(relations):
  cells = np.concatenate([tied.ravel() for tied in relations.cells.values()])
  assert sorted(cells) == list(range(relations.grid**2))


@ALL
@pytest.mark.parametrize("kind", KINDS)
def test_number_of_relations_is_that_of_the_setting(relations, kind):
  each = relations.grid // 2 if kind == "mirrored_rows" else 1
  assert len(relations.cells[kind]) == each * getattr(relations, kind)


def test_far_pairs_are_half_a_grid_apart_and_near_pairs_side_by_side():
  for first, second in LARGE.cells["far_pairs"]:
    rows, columns = np.abs(np.subtract(divmod(first, 9), divmod(second, 9)))
    assert max(rows, columns) >= 4
  near = LARGE.cells["near_pairs"]
  assert (near[:, 1] - near[:, 0] == 1).all() and (
    near[:, 0] // 9 == near[:, 1] // 9
  ).all()


@ALL
def test_glyphs_are_read_back_exactly(relations):
  source = RelationsSource(relations, num_images=50)
  glyphs, distances = relations.read(images(source, 50))
  np.testing.assert_array_equal(glyphs, source.all_cells)
  assert distances.max() < 1e-3


def test_every_glyph_occurs_in_every_free_cell():
  free = SMALL.cells["free"][:, 0]
  glyphs = RelationsSource(SMALL, num_images=500).all_cells[:, free]
  assert all(set(column) == set(range(8)) for column in glyphs.T)


def test_counted_cells_stand_at_every_place_of_the_row():
  row = SMALL.cells["counts"][0]
  zeros = RelationsSource(SMALL, num_images=500).all_cells[:, row] == 0
  assert (zeros.sum(axis=1) == 2).all()
  assert (np.abs(zeros.mean(axis=0) - 0.5) < 0.07).all()  # 3 standard errors


def test_shift_moves_cells_around_the_edges():
  shifted = images(RelationsSource(Relations(shift=3)), 4)
  straight = images(RelationsSource(Relations()), 4)
  np.testing.assert_array_equal(np.roll(straight, (3, 3), (1, 2)), shifted)


def test_example_depends_on_seed_and_index_alone():
  first, second = RelationsSource(SMALL, seed=5), RelationsSource(SMALL, 100, seed=5)
  np.testing.assert_array_equal(first[71]["image"], second[71]["image"])
  other = RelationsSource(SMALL, seed=6)
  assert (first[71]["image"] != other[71]["image"]).any()


def test_label_chooses_the_relations_that_hold():
  source = RelationsSource(SMALL, num_images=400, labels=True)
  assert source.num_classes == 16
  assert source.class_names[5] == "near_pairs+sums"
  labels = np.array([source[index]["label"] for index in range(400)])
  for kind in SMALL.kinds:
    holds = SMALL.holds(kind, source.all_cells).all(axis=1)
    asked = np.array([kind in source.kinds_of(label) for label in labels])
    assert holds[asked].all()
    assert holds[~asked].mean() < 0.5


def test_endless_source_has_an_example_at_its_end():
  source = RelationsSource(SMALL)
  assert source.is_endless and len(source) == ENDLESS
  assert source[ENDLESS - 1]["image"].shape == (16, 16, 1)


@pytest.mark.parametrize(
  ("arguments", "setting"),
  [
    ({"grid": 3}, "grid"),
    ({"grid": 4.0}, "grid"),
    ({"glyph_size": 3}, "glyph_size"),
    ({"glyphs": 17}, "glyphs"),
    ({"glyphs": 1}, "glyphs"),
    ({"near_pairs": 9}, "near_pairs"),
    ({"far_pairs": -1}, "far_pairs"),
    ({"far_pairs": 6}, "far_pairs"),
    ({"sums": 3}, "sums"),
    ({"mirrored_rows": 3, "counts": 2}, "counts"),
    ({"mirrored_rows": 16}, "mirrored_rows"),
    ({"num_images": ENDLESS}, "num_images"),
    ({"grid": "4"}, "grid"),
    (
      {"mirrored_rows": 4, "counts": 0, "near_pairs": 0, "far_pairs": 0, "sums": 0},
      "mirrored_rows",
    ),
    ({"counted": 4}, "counted"),
    ({"shift": 4}, "shift"),
    ({"num_images": 0}, "num_images"),
    ({"labels": 1}, "labels"),
    ({"seed": -1}, "seed"),
    ({"cells": 4}, "cells"),
  ],
)
def test_bad_argument_is_named(arguments, setting):
  with pytest.raises(SettingError) as error:
    open_with(arguments)
  assert error.value.setting == f"config.data.arguments.{setting}"


@pytest.mark.parametrize(
  ("image_size", "channels", "setting"),
  [(8, 1, "config.model.input_size"), (16, 3, "config.model.in_channels")],
)
def test_network_of_another_input_is_refused(image_size, channels, setting):
  with pytest.raises(SettingError) as error:
    open_with({}, image_size, channels)
  assert error.value.setting == setting


def test_arguments_of_another_source_are_refused():
  with pytest.raises(SettingError) as error:
    create_source(
      "digits",
      path=None,
      image_size=8,
      channels=1,
      max_unreadable=0,
      arguments={"grid": 4},
    )
  assert error.value.setting == "config.data.arguments"


def experiment(**data):
  config = default_config()
  config.data.source = "relations"
  config.model.input_size, config.model.in_channels = 16, 1
  config.data.flip = False
  config.data.update(data)
  return mdt_jax.build(config)


def test_build_opens_the_source_of_the_config():
  source = experiment(arguments={"num_images": 20, "glyphs": 4}, validation=0.1).source
  assert len(source) == 18
  assert source[0]["image"].shape == (16, 16, 1)


def test_flips_are_refused():
  with pytest.raises(SettingError) as error:
    _ = experiment(flip=True).source
  assert error.value.setting == "config.data.flip"


def test_endless_data_holds_no_example_out():
  with pytest.raises(SettingError) as error:
    _ = experiment(validation=0.1).source
  assert error.value.setting == "config.data.validation"
