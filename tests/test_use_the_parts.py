"""The code blocks of docs/use_the_parts.md run in order and have the stated results."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from mdt_jax.experiment import build
from tests import forked

PAGE = Path(__file__).parents[1] / "docs" / "use_the_parts.md"
# Name of a result -> its expression after all blocks of the page.
RESULTS = {
  "loss": "loss",
  "last n": "n",
  "workdir": "workdir",
  "step of the data set": "final.step",
  "kernel": "pipeline.params['Conv_1']['kernel']",
  "drawn": "drawn",
  "images scored": "scored['images']",
  "frechet": "scored['scores']['frechet']",
  "step of the objective": "huber.step",
  "step written": "memory.last[0]",
  "loss written": "memory.last[1]['loss']",
  "steps seen": "seen",
  "activations": "activations",
  "in_blocks": "captured['intermediates']['in_blocks']['__call__'][0]",
  "weights": "weights",
  "output": "output",
  "tangent": "tangent",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """Runs all blocks as one program in one process; returns `RESULTS` as arrays."""
  flags = re.DOTALL | re.MULTILINE
  blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags)
  assert len(blocks) == 10
  folder = tmp_path_factory.mktemp("page")
  saved = ", ".join(f"{name!r}: {value}" for name, value in RESULTS.items())
  blocks.append(f"np.savez({str(folder / 'results.npz')!r}, **{{{saved}}})\n")
  path = folder / "program.py"
  path.write_text("\n".join(blocks))
  process = forked.Forked(runpy.run_path, str(path))
  assert process.end() == 0, process.err
  with np.load(folder / "results.npz") as data:
    return {name: data[name] for name in data.files}


def test_custom_loop_trains(results):
  assert np.isfinite(results["loss"])
  assert results["last n"] == 1


def test_custom_loop_has_at_most_20_lines():
  loop = re.findall(r"^@jax.jit\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
  assert len([line for line in loop[0].splitlines() if line.strip()]) <= 20


def test_custom_data_set_trains(results):
  assert results["step of the data set"] == 2


def test_custom_network_trains_and_samples(results):
  assert results["kernel"].shape == (3, 3, 16, 2)
  assert results["drawn"].shape == (2, 8, 8, 1)
  assert results["drawn"].dtype == np.uint8


def test_custom_network_is_scored(results):
  assert results["images scored"] == 16
  assert np.isfinite(results["frechet"])


def test_custom_objective_trains(results):
  assert results["step of the objective"] == 2


def test_writers_and_hooks_see_every_step(results):
  assert results["step written"] == 2 and np.isfinite(results["loss written"])
  assert results["steps seen"].tolist() == [1, 2]


def test_activations_of_every_decode_block_are_captured(results):
  assert results["activations"].shape == (2, 3, 16, 32)


def test_in_blocks_are_captured_twice(results):
  first, second = results["in_blocks"]
  assert first.shape == (1, 3, 16, 32)
  np.testing.assert_array_equal(first, second)


def test_sown_attention_weights_sum_to_one(results):
  assert results["weights"].shape == (2, 3, 2, 16, 16)
  np.testing.assert_allclose(results["weights"].sum(-1), 1, atol=1e-5)


def test_jvp_is_finite_and_not_zero(results):
  assert results["output"].shape == results["tangent"].shape == (3, 8, 8, 2)
  assert np.isfinite(results["tangent"]).all() and np.any(results["tangent"])


def test_config_outside_the_clone_works(results):
  found = runpy.run_path(f"{results['workdir']}/mine.py")["get_config"]()
  assert build(found, jax.devices()[:1]).model.hidden_size == 768
