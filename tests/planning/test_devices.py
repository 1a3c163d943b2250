"""open_devices: devices of the compilers for TPUs and GPUs."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from mdt_jax.chips import CHIPS, parse_topology
from mdt_jax.errors import SettingError
from mdt_jax.gpus import TARGETS, target_config
from mdt_jax.planning import devices

HAS_CUDA = (
  importlib.util.find_spec("jax_plugins") is not None
  and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
)


def test_missing_gpu_compiler_is_named_with_the_way_to_install_it(monkeypatch):
  monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SettingError, match=r"'h100:8'.*GPU compiler.*\.\[cuda\]'$"):
    devices.open_devices(parse_topology("h100:8"))


def test_kernels_are_not_timed_for_gpus_alone():
  options = devices.compiler_options(parse_topology("a100:1"))
  assert options["xla_gpu_autotune_level"] == 0
  assert devices.compiler_options(parse_topology("v5e:2x4")) == {}


@pytest.mark.parametrize("name", TARGETS)
def test_target_has_the_figures_of_the_chip(name):
  text = target_config(TARGETS[name])
  fields = dict(re.findall(r"^ *(\w+): (\d+)$", text, re.M))
  assert int(fields["memory_bandwidth"]) == CHIPS[name].bandwidth
  assert int(fields["device_memory_size"]) > CHIPS[name].memory
  assert text.count("{") == text.count("}")


@pytest.mark.skipif(not HAS_CUDA, reason="jax-cuda13-plugin is not installed")
def test_plan_of_gpus_has_collectives_and_kernels(tmp_path):
  # In a process of its own: JAX has started its devices in this one.
  plan = tmp_path / "plan.json"
  config = tmp_path / "config.py"
  config.write_text(
    "from tests.training.tiny import tiny_dit_config\n"
    "def get_config(): return tiny_dit_config(**{'mesh.fsdp': 2})\n"
  )
  command = ("-m", "mdt_jax.plan", f"--config={config}", "--topology=h100:2")
  subprocess.run([sys.executable, *command, f"--json={plan}"], check=True)
  found = json.loads(plan.read_text())
  assert found["mesh"]["fsdp"] == 2
  assert found["collectives"]["all-gather"]["sent"] > 0
  assert found["kernels"]
  assert found["memory"]["temporaries"] > 0
  assert found["limit"] == CHIPS["h100"].memory
