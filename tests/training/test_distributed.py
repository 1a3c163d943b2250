"""Starting several processes, and errors that all of them report."""

from __future__ import annotations

import functools
import importlib
import os
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import distributed as jax_distributed

from mdt_jax import cli
from mdt_jax.errors import SettingError
from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from mdt_jax.experiment import build
from mdt_jax.training import distributed, loop
from tests import forked, reference
from tests.training.tiny import tiny_config, tiny_dit_config

TIMEOUT = 3


def test_single_process_starts_nothing(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  distributed.start()
  assert distributed.process_index() == 0


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("host:1", None, 0), "--num_processes = None: must be given with the other two"),
    ((None, 2, 0), "--coordinator_address = None: must be given with the other two"),
    (("host:1", 2, None), "--process_id = None: must be given with the other two"),
    (("host", 2, 0), "--coordinator_address = 'host': must be HOST:PORT"),
    (("host:port", 2, 0), "--coordinator_address = 'host:port': must be HOST:PORT"),
    (
      ("host:70000", 2, 0),
      "--coordinator_address = 'host:70000': must have a port in [1, 65,535]",
    ),
    (("host:1", 0, 0), "--num_processes = 0: must be at least 1"),
    (("host:1", 2, 2), "--process_id = 2: must lie in [0, 2)"),
  ],
)
def test_incomplete_or_invalid_flags_are_refused(given, message):
  with pytest.raises(SettingError, match=f"^{re.escape(message)}$"):
    distributed.start(*given)


def test_negative_process_is_refused_without_a_number_of_processes():
  message = r"^--process_id = -1: must be at least 0$"
  with pytest.raises(SettingError, match=message):
    distributed.start(process_id=-1, detect=True)


def test_environment_variable_that_is_not_a_number_is_refused(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(SettingError, match=r"^--num_processes = 'two': must be a whole"):
    distributed.start("host:1")


def join(address, index, timeout=120):
  distributed.start(address, 2, index, timeout=timeout)


@pytest.mark.parametrize("index", [0, 1])
def test_timeout_error_names_the_coordinator_address(index):
  address = forked.free_address()
  process = forked.Forked(join, address, index, TIMEOUT)
  assert process.end() == EXIT_TRY_AGAIN
  last = process.err.splitlines()[-1]
  assert last.startswith(f"error: --coordinator_address = '{address}': ")
  assert f"{TIMEOUT} s" in last


def in_two_processes(target):
  """Calls `target(index)` in two processes and returns the output of each."""
  address = forked.free_address()
  processes = [forked.Forked(joined, address, i, target) for i in range(2)]
  for process in processes:
    assert process.end() == 0, process.err
  return [process.out for process in processes]


def joined(address, index, target):
  join(address, index)
  target(index)


def compare(index):
  distributed.check_same_config(tiny_config(seed=3))
  try:
    distributed.check_same_config(tiny_config(seed=index, num_samples=4 + index))
  except SettingError as error:
    print(error)


def test_all_processes_name_the_settings_that_differ():
  for text in in_two_processes(compare):
    line = text.splitlines()[-1]
    assert "must be the same on every process" in line
    assert "config.num_samples is 4 on process 0 and 5 on 1" in line
    assert "config.seed is 0 on process 0 and 1 on 1" in line


def compare_weights(index):
  distributed.check_same_weights("a.pt", "0b2f525f")
  distributed.check_same_weights("a.pt", "0b2f525f" if index else None)
  with pytest.raises(SettingError) as caught:
    distributed.check_same_weights("a.pt", f"0000000{index}")
  assert caught.value.setting == "config.init.path"
  assert "00000000, 00000001" in caught.value.accepted


def test_all_processes_start_from_the_same_weights():
  in_two_processes(compare_weights)


def fail(index):
  for failure in (SettingError("config.seed", -1, "too small"), OSError("no answer")):
    try:
      with distributed.together():
        if index == 0:
          raise failure
    except Exception as error:
      print(f"{type(error).__name__}: {error}")


def test_error_of_one_process_is_raised_on_all():
  errors = in_two_processes(fail)
  assert errors[0].splitlines()[-2:] == [
    "SettingError: config.seed = -1: too small",
    "OSError: no answer",
  ]
  first, second = errors[1].splitlines()[-2:]
  assert first.startswith("SettingError: --process_id = 0: ")
  assert second.startswith("RuntimeError: process 0: ")


VAE = {
  "model.input_size": 4,
  "model.in_channels": 4,
  "data.vae": str(reference.FIXTURES / "vae"),
}
FID = {"eval.every": 2, "eval.metrics": "fid", "eval.inception": "inception.pth"}


def place(index):
  experiment = build(tiny_dit_config(**VAE))
  experiment.read_autoencoder()
  placed = experiment.autoencoder
  assert placed is not None
  for leaf in jax.tree.leaves(placed.params):
    assert len(leaf.sharding.device_set) == 2 and leaf.is_fully_replicated


def test_autoencoder_is_placed_on_the_devices_of_all_processes():
  in_two_processes(place)


def train_without(index, workdir, changes, module, reader, setting):
  """Trains where process 1 lacks the file that `module.reader` reads."""
  module = importlib.import_module(module)
  original = getattr(module, reader)

  def read(path, *arguments):
    if index == 1:
      raise SettingError(setting, path, "is not on this machine")
    return original(path, *arguments) if reader == "load_vae" else {"a": np.zeros(1)}

  setattr(module, reader, read)
  with pytest.raises(SettingError) as caught:
    loop.train(tiny_dit_config(**changes), workdir)
  print(caught.value.setting)


@pytest.mark.parametrize(
  ("changes", "module", "reader", "setting"),
  [
    (VAE, "mdt_jax.pretrained.autoencoder", "load_vae", "config.data.vae"),
    (FID, "mdt_jax.evaluation.evaluator", "load_inception", "config.eval.inception"),
  ],
)
def test_file_that_one_process_lacks_is_named(
  tmp_path, changes, module, reader, setting
):
  target = functools.partial(
    train_without,
    workdir=tmp_path / "run",
    changes=changes,
    module=module,
    reader=reader,
    setting=setting,
  )
  outputs = in_two_processes(target)
  assert [text.splitlines()[-1] for text in outputs] == ["--process_id", setting]
  assert not (tmp_path / "run").exists()


# The end: processes wait for each other, and a lost process is told from other aborts.


def shorten(timeout):
  """Sets JAX's wait at the exit, in seconds, which is 300 by default."""
  library = vars(jax_distributed)["_jax"]
  start_service = library.get_distributed_runtime_service

  def start(*arguments, **options):
    return start_service(*arguments, **options | {"shutdown_timeout": timeout})

  library.get_distributed_runtime_service = start


def run_command(address, index, main):
  shorten(2)
  sys.argv = [
    "command",
    f"--coordinator_address={address}",
    "--num_processes=2",
    f"--process_id={index}",
  ]
  cli.run(main)


def finish_late(argv):
  if distributed.process_index() == 0:
    time.sleep(6)


def test_command_waits_for_the_processes_that_are_not_done():
  address = forked.free_address()
  started = [forked.Forked(run_command, address, i, finish_late) for i in range(2)]
  assert [process.end() for process in started] == [0, 0], started[1].err


def finish_never(argv):
  if distributed.process_index() == 1:
    time.sleep(60)
  print("done")


def test_signal_ends_a_command_that_waits():
  address = forked.free_address()
  started = [forked.Forked(run_command, address, i, finish_never) for i in range(2)]
  started[0].wait_for("done")
  started[0].signal(signal.SIGINT)
  assert started[0].end() == EXIT_INTERRUPTED
  started[1].kill()


def wait_for_loss(address, index):
  distributed.HEARTBEAT_SECONDS = 4
  join(address, index)
  print("joined")
  time.sleep(60)


@pytest.mark.parametrize("killed", [0, 1])
def test_loss_that_jax_reports_ends_with_75(killed):
  address = forked.free_address()
  started = [forked.Forked(wait_for_loss, address, i) for i in range(2)]
  for process in started:
    process.wait_for("joined")
  started[killed].kill()
  other = started[1 - killed]
  assert other.end() == EXIT_TRY_AGAIN, other.err
  assert other.err.splitlines()[-1] == distributed.LOST


def abort(address, index, count):
  distributed.start(address, count, index, timeout=120)
  if index == 0:
    os.abort()
  time.sleep(60)


@pytest.mark.parametrize("count", [1, 2])
def test_other_aborts_are_no_loss(count):
  address = forked.free_address()
  started = [forked.Forked(abort, address, i, count) for i in range(count)]
  assert started[0].end() == -signal.SIGABRT
  assert distributed.LOST not in started[0].err
  for process in started[1:]:
    process.kill()
