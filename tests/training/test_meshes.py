"""One run gives the same results on one device, eight devices and several processes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import forked

# The test with several processes uses the meshes 2,2,2, of two slices and with
# MDTv2 too, and 2,4,1.
EIGHT_DEVICES = ("DiT:8,1,1,1", "MDTv2:1,8,1,1")


def ten_steps(folder, *runs, processes=1, devices=8):
  """Runs `tests.training.ten_steps` in several processes; returns arrays by run."""
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
        *runs,
        environment=environment if processes > 1 else {},
        num_devices=devices,
      )
    )
  for process in running:
    assert process.end() == 0, process.err
  return {run: dict(np.load(folder / f"{run}.npz")) for run in runs}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  """Variant of the network -> its run on one device."""
  folder = tmp_path_factory.mktemp("one")
  runs = ten_steps(folder, "MDTv2:1,1,1,1", "DiT:1,1,1,1", devices=1)
  return {run.partition(":")[0]: found for run, found in runs.items()}


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
  return ten_steps(tmp_path_factory.mktemp("eight"), *EIGHT_DEVICES)


def assert_same_run(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_losses_of_the_run_change_at_every_step(one_device):
  losses = one_device["MDTv2"]["losses/loss"]
  assert losses.shape == (10, 2)
  assert len(np.unique(losses[:, 0])) == 10


@pytest.mark.parametrize("run", EIGHT_DEVICES)
def test_eight_devices_match_one_device(one_device, eight_devices, run):
  assert_same_run(eight_devices[run], one_device[run.partition(":")[0]])


@pytest.mark.parametrize(
  ("processes", "devices", "variant", "mesh"),
  [
    (2, 4, "MDTv2", "-1,2,2,2"),
    (4, 2, "DiT", "2,4,1,1"),  # DiT compiles faster, and each process compiles
  ],
)
def test_several_processes_match_one_device(
  one_device, tmp_path, processes, devices, variant, mesh
):
  run = f"{variant}:{mesh}"
  found = ten_steps(tmp_path, run, processes=processes, devices=devices)
  assert_same_run(found[run], one_device[variant])
