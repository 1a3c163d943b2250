"""Measures the memory of a start from weights: python -m benchmarks.initialization

The command writes random weights of a network of 1,000 classes to a .pt file, starts a
run of 10 classes from it, and prints the peak of the resident memory of that process.
On CPUs it includes the state on the devices, and the pages of the file, which the
system can take back: the peak without them is printed too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from mdt_jax import create_model, sharding
from mdt_jax.config import default_config
from mdt_jax.experiment import build
from mdt_jax.models.registry import abstract_params
from mdt_jax.pretrained.torch_mdt import attributes_of

MODEL = flags.DEFINE_string("model", "MDTv2-XL/2", "Key of mdt_jax.MODELS.")
FILE = flags.DEFINE_string("file", "weights.pt", "File to write, or to read if there.")
FSDP = flags.DEFINE_integer("fsdp", 1, "Simulated devices that divide the state.")
OPTIMIZER = flags.DEFINE_string("optimizer", "adamw", "config.optimizer.name.")
START = flags.DEFINE_bool("start", False, "Whether this process starts the run.")


def write_weights(path: str) -> None:
  """Writes random weights of a network of 1,000 classes."""
  from mdt_jax.pretrained.tensors import write_tensors
  from mdt_jax.pretrained.torch_mdt import to_torch

  model = create_model(MODEL.value)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: 0.02 * rng.standard_normal(a.shape, np.float32), abstract_params(model)
  )
  write_tensors(path, to_torch(attributes_of(model), params))


@dataclasses.dataclass
class Peaks:
  """Largest memory seen, in bytes: all, and without the pages of files."""

  all: int = 0
  anonymous: int = 0

  def watch(self) -> None:
    """Reads the memory of this process until it ends."""
    while True:
      status = Path("/proc/self/status").read_text()
      sizes = dict(re.findall(r"(VmRSS|RssAnon):\s+(\d+) kB", status))
      self.all = max(self.all, 1024 * int(sizes["VmRSS"]))
      self.anonymous = max(self.anonymous, 1024 * int(sizes["RssAnon"]))
      time.sleep(0.01)


def start() -> None:
  """Starts a run of 10 classes from the weights, and prints its memory."""
  from mdt_jax.training.initialization import Initialization
  from mdt_jax.training.program import make_program

  config = default_config()
  config.update_from_flattened_dict(
    {
      "model.name": MODEL.value,
      "model.num_classes": 10,
      "init.path": FILE.value,
      "optimizer.name": OPTIMIZER.value,
      "mesh.data": 1,
      "mesh.fsdp": FSDP.value,
    }
  )
  experiment = build(config)
  peaks = Peaks()
  threading.Thread(target=peaks.watch, daemon=True).start()
  begin = time.perf_counter()
  initialization = Initialization(experiment, Path("no workdir"))
  with sharding.use_mesh(experiment.mesh):
    program = make_program(experiment)
    state = jax.block_until_ready(initialization.first_state(program))
  seconds = time.perf_counter() - begin
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  part = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  largest = max(x.nbytes for x in jax.tree.leaves(state.params))
  gib = 2**30
  print(
    f"{MODEL.value}, {OPTIMIZER.value}, {FSDP.value} devices: {seconds:.0f} s; state "
    f"{size / gib:.2f} GiB, {part / gib:.2f} GiB on each device, largest parameter "
    f"{largest / gib:.2f} GiB; peak {peaks.all / gib:.2f} GiB, without pages of files "
    f"{peaks.anonymous / gib:.2f} GiB"
  )


def main(argv: list[str]) -> None:
  if START.value:
    return start()
  if not os.path.exists(FILE.value):
    write_weights(FILE.value)
  command = [sys.executable, "-m", "benchmarks.initialization", *argv[1:], "--start"]
  for name in ("model", "file", "fsdp", "optimizer"):
    command.append(f"--{name}={getattr(flags.FLAGS, name)}")
  devices = f"--xla_force_host_platform_device_count={FSDP.value}"
  environment = {**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
  sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
  app.run(main)
