"""A run of each method has the same losses on one device and on eight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mdt_jax.training import loop
from mdt_jax.training.metric_lines import FILE, read_lines
from tests import forked
from tests.faults import runs
from tests.training.tiny import tiny_config

# The last layer and the gates of the blocks start at zero, so the first losses do not
# depend on the masks. Within ten steps at this learning rate, a share of 25% removed
# tokens instead of 50% changes the loss of a TREAD by 2e-3.
NUM_STEPS = 10
SETTINGS = {
  "num_steps": NUM_STEPS,
  "log_every": 1,
  "checkpoint_every": NUM_STEPS,
  "optimizer.name": "sgd",  # compiles fast, and has no state to save
  "optimizer.learning_rate": 0.5,
  "diffusion.process": "flow",
  "sampling.method": "heun",
  "model.depth": 3,
  "model.decode_depth": 1,
}
LOSSES = {"loss", "masked_loss", "reconstruction", "gradient_norm"}
METHODS = {
  "DiT": {},
  "MDTv2": {},
  "MaskDiT": {"model.decoder_hidden_size": 8, "model.decoder_num_heads": 2},
  "MicroDiT": {"model.mixer_depth": 1},
  "TREAD": {"model.route_start": 1, "model.route_end": 1},
  "SPRINT": {"model.encoder_depth": 1},
}


def train(folder: Path, mesh: dict[str, int]) -> None:
  """Trains by each method, on all devices of the process."""
  runs.save_whole_arrays()
  for name, settings in METHODS.items():
    network = {"model.name": f"{name}-S/2"}
    config = tiny_config(**SETTINGS, **network, **settings, **mesh)
    loop.train(config, folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The runs on one device, and on 2 x 4 devices."""
  folders, processes = [], []
  for count, mesh in ((1, {}), (8, {"mesh.data": 2, "mesh.fsdp": 4})):
    folders.append(tmp_path_factory.mktemp(f"on_{count}"))
    processes.append(forked.Forked(train, folders[-1], mesh, num_devices=count))
  for process in processes:
    assert process.end() == 0, process.err
  return folders


@pytest.mark.parametrize("name", METHODS)
def test_losses_do_not_depend_on_the_number_of_devices(folders, name):
  one, eight = (read_lines(folder / name / FILE) for folder in folders)
  assert [line["step"] for line in one] == list(range(1, NUM_STEPS + 1))
  for key in LOSSES & one[0].keys():
    found, expected = ([line[key] for line in lines] for lines in (eight, one))
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=key)
