"""A seed determines a run on any number of devices."""

from __future__ import annotations

import numpy as np
import pytest

from tests import forked

DRAWS = ("x0", "t", "weights", "noise", "y", "mask_noise")


def replay(folder, name, num_devices):
  """Returns the arrays of tests.training.replay on `num_devices` simulated devices."""
  path = folder / f"{name}.npz"
  process = forked.command("tests.training.replay", path, num_devices=num_devices)
  assert process.end() == 0, process.err
  with np.load(path) as data:
    return {key: data[key] for key in data.files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("replay")
  return {
    "one": replay(folder, "one", 1),
    "eight": replay(folder, "eight", 8),
    "eight again": replay(folder, "again", 8),
  }


@pytest.mark.parametrize("name", DRAWS)
def test_draws_on_one_and_eight_devices_are_bit_equal(runs, name):
  one, eight = runs["one"][f"draws/{name}"], runs["eight"][f"draws/{name}"]
  assert one.dtype == eight.dtype
  assert one.tobytes() == eight.tobytes()


@pytest.mark.parametrize("name", ["loss", "masked_loss"])
def test_losses_on_one_and_eight_devices_agree(runs, name):
  """The losses follow three training steps, so the gradients agree too."""
  one, eight = runs["one"][f"losses/{name}"], runs["eight"][f"losses/{name}"]
  np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-6)


def test_rerun_on_the_same_devices_is_bit_equal(runs):
  first, second = runs["eight"], runs["eight again"]
  assert first.keys() == second.keys()
  assert not [k for k in first if first[k].tobytes() != second[k].tobytes()]


def test_compared_draws_are_not_trivial(runs):
  """Otherwise, arrays of zeros would pass the tests above."""
  draws = {name: runs["one"][f"draws/{name}"] for name in DRAWS}
  assert draws["noise"].std() > 0.9
  assert len(np.unique(draws["t"])) > 8
  assert (draws["y"] == 10).any()
  assert runs["one"]["losses/loss"].std() > 0
