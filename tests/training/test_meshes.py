"""One run gives the same results on one device, eight devices and several processes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import forked

MESHES = ("8,1,1", "1,8,1")  # The test with several processes uses 2,4,1 and 2,2,2.


def ten_steps(folder, *meshes, processes=1, devices=8):
  """Runs `tests.training.ten_steps` in several processes; returns arrays by mesh."""
  address = forked.free_address()
  running = []
  for index in range(processes):
    environment = {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(processes),
      "JAX_PROCESS_ID": str(index),
    }
    running.append(
      forked.command(
        "tests.training.ten_steps",
        folder,
        *meshes,
        environment=environment if processes > 1 else {},
        num_devices=devices,
      )
    )
  for process in running:
    assert process.end() == 0, process.err
  return {mesh: dict(np.load(folder / f"{mesh}.npz")) for mesh in meshes}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  folder = tmp_path_factory.mktemp("one")
  return ten_steps(folder, "1,1,1", devices=1)["1,1,1"]


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
  return ten_steps(tmp_path_factory.mktemp("eight"), *MESHES)


def assert_same_run(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_losses_of_the_run_change_at_every_step(one_device):
  losses = one_device["losses/loss"]
  assert losses.shape == (10, 2)
  assert len(np.unique(losses[:, 0])) == 10


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_match_one_device(one_device, eight_devices, mesh):
  assert_same_run(eight_devices[mesh], one_device)


@pytest.mark.parametrize(
  ("processes", "devices", "mesh"), [(2, 4, "2,4,1"), (4, 2, "-1,2,2")]
)
def test_several_processes_match_one_device(
  one_device, tmp_path, processes, devices, mesh
):
  found = ten_steps(tmp_path, mesh, processes=processes, devices=devices)
  assert_same_run(found[mesh], one_device)
