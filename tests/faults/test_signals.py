"""Signals during imports, a closed terminal, and a closed pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from mdt_jax.exit_codes import EXIT_INTERRUPTED, EXIT_TRY_AGAIN
from mdt_jax.training.preemption import stop_signals
from tests import forked
from tests.faults import runs

# Waits for a signal in the middle of the imports of a command.
SLOW_IMPORT = """
import time
print("importing", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
  ("number", "code"),
  [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_TRY_AGAIN)],
)
@pytest.mark.parametrize("command", ["main", "sample", "plan"])
def test_signal_during_imports_ends_the_command_with_one_line(
  tmp_path, command, number, code
):
  (tmp_path / "jax.py").write_text(SLOW_IMPORT)  # found before the real one
  process = subprocess.Popen(
    [sys.executable, "-m", f"mdt_jax.{command}"],
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "importing\n"
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code
  assert len(err.splitlines()) == 1, err


def test_closed_terminal_saves_and_stops(tmp_path):
  run = runs.Run(tmp_path / "run", "--config.checkpoint_every=1000")
  run.wait_for("^step 3/")
  run.signal(signal.SIGHUP)
  assert run.end() == EXIT_TRY_AGAIN, run.log.read_text()
  assert runs.steps_saved(tmp_path / "run") == run.steps()[-1:]


@pytest.mark.parametrize("gap", [0.0001, 0.0003, 0.0006, 0.001])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_second_signal_in_the_handler_of_the_first_is_no_error(number, gap):
  process = forked.Forked(wait_for_signals)
  process.wait_for("^waiting")
  process.signal(number)
  time.sleep(gap)
  with contextlib.suppress(ProcessLookupError):
    process.signal(number)
  code = process.end()
  # bash sends SIGHUP, and then so does the kernel; SIGTERM twice may end the process.
  assert code == 0 or (code == -number and number != signal.SIGHUP), process.err
  assert "Error" not in process.err


def wait_for_signals():
  with stop_signals(grace_seconds=60) as received:
    print("waiting")
    while not received:
      time.sleep(0.001)
    time.sleep(0.05)


def test_run_under_nohup_ignores_a_closed_terminal(tmp_path):
  run = runs.Run(tmp_path / "run", before=ignore_sighup)
  run.wait_for("^step 3/")
  run.signal(signal.SIGHUP)
  assert run.end() == 0, run.log.read_text()
  assert run.steps()[-1] == 30


def ignore_sighup():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_command_goes_on_when_the_reader_of_its_output_ends(tmp_path):
  workdir = tmp_path / "run"
  process = runs.subprocess_of(workdir, "--config.num_steps=4")
  process.stdout.readline()
  process.stdout.close()
  err = process.stderr.read()
  assert process.wait(timeout=300) == 0, err
  assert "Traceback" not in err and "Error" not in err
  assert runs.steps_saved(workdir) == [4]


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
  command = [sys.executable, "-m", "mdt_jax.plan", "--config=ä", "--topology=v5e:1x1"]
  environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
  result = subprocess.run(command, env=environment, capture_output=True)
  assert result.returncode == 2, result.stderr
  assert rb"\xe4" in result.stderr and len(result.stderr.splitlines()) == 1
