"""The pictures of a run: captions of the grid, and strips from noise to sample."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data.sources import MemorySource
from mdt_jax.experiment import build
from mdt_jax.sampling import pictures
from mdt_jax.sampling.blocks import Request
from mdt_jax.sampling.generator import DRAW, make_generator
from mdt_jax.sampling.job import SamplingJob
from mdt_jax.sampling.stepwise import Stepper
from mdt_jax.training.sample_pictures import Pictures, distinct_rows, strip_calls
from tests import reference
from tests.training.tiny import tiny_dit_config

FACTOR = 8  # by which a grid enlarges images of 8 x 8 pixels
TILE_WIDTH = 8 * FACTOR + pictures.MARGIN
TILE_HEIGHT = 8 * FACTOR + pictures.CAPTION_HEIGHT


def corner(index, columns):
  """(x, y) of the caption of an image in a grid."""
  row, column = divmod(index, columns)
  return pictures.MARGIN + column * TILE_WIDTH, row * TILE_HEIGHT


def tile(grid, index, columns):
  """The 8 x 8 pixels of an image in a grid."""
  x, y = corner(index, columns)
  y += pictures.CAPTION_HEIGHT
  pixels = np.asarray(grid.convert("L"))
  return pixels[y : y + 8 * FACTOR : FACTOR, x : x + 8 * FACTOR : FACTOR]


def caption(grid, index, columns):
  """The pixels of the caption of an image in a grid."""
  x, y = corner(index, columns)
  return np.asarray(grid.convert("L"))[y : y + pictures.CAPTION_HEIGHT, x:][:, :64]


def make(tmp_path, source=None, **settings):
  """(experiment, parameters, pictures by name) of a random network."""
  changes = {"sample_every": 1, "sampling.num_steps": 12, **settings}
  experiment = build(tiny_dit_config(**changes), source=source)
  experiment.open()
  params = reference.random_params(experiment.model)
  made = Pictures(experiment, tmp_path / "samples")._make(1, {"0.9": params}, bool)
  return experiment, params, made


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"sampling.method": "ddim", "sampling.cfg_scale": 2.0},
    {"sampling.method": "heun"},
    {"sampling.method": "dpm++sde", "model.dtype": "bfloat16"},
  ],
  ids=["ddpm", "guided ddim", "heun", "dpm++sde in bfloat16"],
)
def test_last_image_of_a_strip_has_the_bits_of_the_sampler(tmp_path, settings):
  experiment, params, made = make(tmp_path, **settings)
  labels, ids = np.arange(4, dtype=np.int32), np.arange(4, dtype=np.uint32)
  generate = make_generator(experiment.model, experiment.sampler)
  expected = np.asarray(generate(params, labels, ids, np.uint32(0)))
  kept_calls = strip_calls(experiment.sampler.calls_a_pass)
  keeping = make_generator(experiment.model, experiment.sampler, kept_calls=kept_calls)
  found = np.asarray(keeping(params, labels, ids, np.uint32(0)))
  assert found.shape == (4, 8, 8, 8, 1)
  assert found[:, -1].tobytes() == expected.tobytes()
  shown = pictures.to_uint8(expected, experiment.model)[..., 0]
  for row in range(4):
    np.testing.assert_array_equal(tile(made["strips"], 8 * row + 7, 8), shown[row])
    np.testing.assert_array_equal(tile(made["samples"], row, 2), shown[row])


def test_strip_shows_the_predictions_of_the_stepper(tmp_path):
  """The stepper calls the network alone; it agrees up to rounding."""
  experiment, params, made = make(tmp_path, **{"sampling.method": "ddim"})
  request = Request(np.arange(4, dtype=np.int32), 0, 4)
  job = SamplingJob(experiment, params, 0, None, DRAW, request)
  stepper = Stepper()
  steps = list(stepper.run(job))
  calls = strip_calls(12)
  assert calls == [0, 2, 3, 5, 6, 8, 9]
  for column, call in enumerate(calls):
    images = stepper.decode(job, steps[call].x0)[..., 0].astype(int)
    for row in range(4):
      found = tile(made["strips"], 8 * row + column, 8).astype(int)
      assert np.abs(found - images[row]).max() <= 1, (row, column)
  first, last = (tile(made["strips"], column, 8).astype(int) for column in (0, 7))
  assert np.abs(first - last).max() > 20


def test_captions_name_the_classes_of_the_images(tmp_path):
  images = np.zeros((4, 8, 8, 1), np.uint8)
  source = MemorySource(images, [1, 3, 3, 1], 4, ["ant", "bee", "cow", "dog"])
  _, _, made = make(tmp_path, source, num_strips=2)
  for name, columns, row_length in (("samples", 2, 1), ("strips", 8, 8)):
    bee, dog = (caption(made[name], i * row_length, columns) for i in (0, 1))
    assert (bee < 128).sum() > 10 and (dog < 128).sum() > 10
    assert np.any(bee != dog)
    expected = pictures.make_grid(images[:2], ["1 bee", "3 dog"])
    np.testing.assert_array_equal(bee, caption(expected, 0, 2))
    np.testing.assert_array_equal(dog, caption(expected, 1, 2))
  # Images 0 and 2 of the grid have the same class.
  same = (caption(made["samples"], i, 2) for i in (0, 2))
  np.testing.assert_array_equal(*same)
  assert made["strips"].size == (8 * TILE_WIDTH + 2, 2 * TILE_HEIGHT + 2)


def test_captions_of_a_strip_count_the_calls(tmp_path):
  _, _, made = make(tmp_path, num_strips=1)
  expected = pictures.make_grid(
    np.zeros((8, 8, 8, 1), np.uint8),
    ["0", "3/12", "4/12", "6/12", "7/12", "9/12", "10/12", "sample"],
    columns=8,
  )
  for i in range(8):
    np.testing.assert_array_equal(
      caption(made["strips"], i, 8), caption(expected, i, 8)
    )


def test_grid_is_the_same_without_strips(tmp_path):
  _, _, with_strips = make(tmp_path)
  _, _, without = make(tmp_path, num_strips=0)
  assert set(with_strips) == {"samples", "strips"} and set(without) == {"samples"}
  assert with_strips["samples"].tobytes() == without["samples"].tobytes()


def test_sampler_in_time_draws_the_grid_alone(tmp_path):
  flow = {"diffusion.process": "flow", "model.name": "SiT-S/2"}
  _, _, made = make(tmp_path, **flow, **{"sampling.method": "ode_euler"})
  assert set(made) == {"samples"}


def test_strips_are_written_beside_the_grids(tmp_path):
  pictures_hook = Pictures(build(tiny_dit_config()), tmp_path / "samples")
  made = {"samples": Image.new("RGB", (8, 8)), "strips": Image.new("RGB", (9, 8))}
  (tmp_path / "samples").mkdir()
  pictures_hook._write(tmp_path / "samples" / "step_1.png", made)
  for name, width in (("samples", 8), ("strips", 9)):
    with Image.open(tmp_path / name / "step_1.png") as picture:
      assert picture.size == (width, 8)


@pytest.mark.parametrize(
  ("count", "calls"),
  [
    (250, [0, 36, 71, 107, 142, 178, 213]),
    (8, [0, 1, 2, 3, 4, 5, 6]),
    (3, [0, 1]),
    (1, []),
  ],
)
def test_calls_of_a_strip_are_evenly_spaced(count, calls):
  assert strip_calls(count) == calls


def test_rows_of_strips_have_different_classes_first():
  assert distinct_rows(["b", "b", "a", "a", "c"], 3) == [0, 2, 4]
  assert distinct_rows(["b", "b", "a"], 9) == [0, 2, 1]
  assert distinct_rows(["b"], 0) == []
