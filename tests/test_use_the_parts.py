"""The code blocks of docs/use_the_parts.md run in order and have the stated results."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from mdt_jax.experiment import build

PAGE = Path(__file__).parents[1] / "docs" / "use_the_parts.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
  """Runs all blocks as one program and returns the names that they define."""
  flags = re.DOTALL | re.MULTILINE
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags)
  assert len(blocks) == 10
  path = tmp_path_factory.mktemp("page") / "program.py"
  path.write_text("\n".join(blocks))
  return runpy.run_path(str(path))


def test_custom_loop_trains(names):
  assert np.isfinite(names["loss"])
  assert names["n"] == 1


def test_custom_loop_has_at_most_20_lines():
  loop = re.findall(r"^@jax.jit\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
  assert len([line for line in loop[0].splitlines() if line.strip()]) <= 20


def test_custom_data_set_trains(names):
  assert int(names["final"].step) == 2


def test_custom_network_trains_and_samples(names):
  drawn = names["pipeline"].draw([3, 4], num_steps=2)
  assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == np.uint8
  kernel = names["pipeline"].params["Conv_1"]["kernel"]
  assert kernel.shape == (3, 3, 16, 2)


def test_custom_network_is_scored(names):
  assert names["scored"]["images"] == 16
  assert np.isfinite(names["scored"]["scores"]["frechet"])


def test_pipeline_of_the_page_draws_pixels(names):
  assert names["drawn"].shape == (2, 8, 8, 1) and names["drawn"].dtype == np.uint8


def test_custom_objective_trains(names):
  assert int(names["huber"].step) == 2


def test_writers_and_hooks_see_every_step(names):
  step, scalars = names["memory"].last
  assert step == 2 and np.isfinite(scalars["loss"])
  assert names["seen"] == [1, 2]


def test_activations_of_every_decode_block_are_captured(names):
  assert names["activations"].shape == (2, 3, 16, 32)


def test_in_blocks_are_captured_twice(names):
  first, second = names["captured"]["intermediates"]["in_blocks"]["__call__"][0]
  assert first.shape == (1, 3, 16, 32)
  np.testing.assert_array_equal(first, second)


def test_sown_attention_weights_sum_to_one(names):
  assert names["weights"].shape == (2, 3, 2, 16, 16)
  np.testing.assert_allclose(names["weights"].sum(-1), 1, atol=1e-5)


def test_jvp_is_finite_and_not_zero(names):
  assert names["output"].shape == names["tangent"].shape == (3, 8, 8, 2)
  assert np.isfinite(names["tangent"]).all() and np.any(names["tangent"])


def test_config_outside_the_clone_works(names):
  found = runpy.run_path(f"{names['workdir']}/mine.py")["get_config"]()
  assert build(found, jax.devices()[:1]).model.hidden_size == 768
