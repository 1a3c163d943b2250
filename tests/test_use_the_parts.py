"""Every block of docs/use_the_parts.md runs, in order, and does what the page says."""

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
  """What the blocks define, run as one program."""
  flags = re.DOTALL | re.MULTILINE
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags)
  assert len(blocks) == 7
  path = tmp_path_factory.mktemp("page") / "program.py"
  path.write_text("\n".join(blocks))
  return runpy.run_path(str(path))


def test_a_loop_of_one_s_own_trains(names):
  assert np.isfinite(names["loss"])
  assert names["n"] == 1


def test_a_loop_of_one_s_own_is_short():
  loop = re.findall(r"^@jax.jit\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
  assert len([line for line in loop[0].splitlines() if line.strip()]) <= 20


def test_a_data_set_of_one_s_own_is_trained_on(names):
  assert int(names["final"].step) == 2


def test_a_network_of_one_s_own_is_trained_and_sampled(names):
  drawn = names["pipeline"].draw([3, 4], num_steps=2)
  assert drawn.shape == (2, 8, 8, 1) and drawn.dtype == np.uint8
  kernel = names["pipeline"].params["Conv_1"]["kernel"]
  assert kernel.shape == (3, 3, 16, 2)


def test_a_network_of_one_s_own_is_scored(names):
  assert names["scored"]["images"] == 16
  assert np.isfinite(names["scored"]["scores"]["frechet"])


def test_an_objective_of_one_s_own_is_descended(names):
  assert int(names["huber"].step) == 2


def test_writers_and_hooks_see_every_step(names):
  step, scalars = names["memory"].last
  assert step == 2 and np.isfinite(scalars["loss"])
  assert names["seen"] == [1, 2]


def test_a_config_outside_the_clone_is_found(names):
  found = runpy.run_path(f"{names['workdir']}/mine.py")["get_config"]()
  assert build(found, jax.devices()[:1]).model.hidden_size == 768
