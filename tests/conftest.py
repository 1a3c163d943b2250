"""Shared by all tests: XLA's flags, a cache of compiled functions, faults to try."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

pytest_plugins = ["tests.fake_bucket"]

# Compiling takes most of the time of the tests, and a quarter of it with these flags.
# All tests pass without them too: XLA_FLAGS= python -m pytest
FAST_COMPILATION = (
  "--xla_backend_optimization_level=0 "
  "--xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1"
)


def xla_knows(flags: str) -> bool:
  """Whether this version of XLA has the flags. An unknown flag ends the process."""
  code = "import jax; jax.devices()"
  environment = {**os.environ, "XLA_FLAGS": flags}
  command = [sys.executable, "-c", code]
  return not subprocess.run(command, env=environment, capture_output=True).returncode


# Shells start background commands with SIGINT ignored, and nohup ignores SIGHUP. Tests
# of signals and the processes that tests start would inherit this.
for number, handler in (
  (signal.SIGINT, signal.default_int_handler),
  (signal.SIGHUP, signal.SIG_DFL),
):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, handler)

# Before JAX is imported; the workers of pytest-xdist get these from the first process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  compiled = tempfile.mkdtemp(prefix="mdt_jax_compiled_")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = FAST_COMPILATION if xla_knows(FAST_COMPILATION) else ""

# These files run first, so that no worker is left alone with a long one at the end.
LONGEST = (
  "test_sharding.py",
  "training/test_meshes.py",
  "objectives/test_meshes.py",
  "test_readme.py",
  "test_commands.py",
  "training/test_loop.py",
  "faults/test_kill.py",
  "training/test_step.py",
  "training/test_skipped.py",
  "faults/test_processes.py",
  "models/test_mdt.py",
  "training/test_determinism.py",
  "test_use_the_parts.py",
  "test_pinned.py",
)


def pytest_collection_modifyitems(items):
  def place(item):
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)

  items.sort(key=place)


def pytest_collection_finish():
  # Tracing makes many small objects, and few cycles of them: with Python's thresholds,
  # the collector takes a tenth of the time of the tests.
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser):
  parser.addoption(
    "--all-faults", action="store_true", help="the whole of tests/faults: half an hour"
  )


def pytest_configure(config):
  config.addinivalue_line(
    "markers",
    "faults(short, whole): runs once for each `fault` from 0 on, so many in the suite "
    "and with --all-faults.",
  )


def pytest_generate_tests(metafunc):
  marker = metafunc.definition.get_closest_marker("faults")
  if marker is not None:
    whole = metafunc.config.getoption("--all-faults")
    metafunc.parametrize("fault", range(marker.kwargs["whole" if whole else "short"]))
