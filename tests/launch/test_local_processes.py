"""local_processes.py: environment, output, signals and exit codes of N processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "local_processes.py"


def start(*flags, script="", **environment):
  return subprocess.Popen(
    [sys.executable, LAUNCHER, *flags, "--", sys.executable, "-c", script],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, **environment},
  )


def run(*flags, script="", **environment):
  process = start(*flags, script=script, **environment)
  out, err = process.communicate(timeout=60)
  return process.returncode, out.splitlines(), err


def test_each_process_gets_its_id_address_and_devices():
  script = (
    "import os; print(*(os.environ[n] for n in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES',"
    " 'JAX_COORDINATOR_ADDRESS', 'JAX_PLATFORMS', 'XLA_FLAGS')))"
  )
  code, lines, err = run("--processes=3", "--devices=5", script=script, XLA_FLAGS="--a")
  assert code == 0, err
  found = [line.split() for line in sorted(lines)]
  addresses = {words[3] for words in found}
  assert len(addresses) == 1
  host, port = addresses.pop().split(":")
  assert host == "127.0.0.1"
  assert int(port) > 0
  flag = "--xla_force_host_platform_device_count=5"
  for i, words in enumerate(found):
    assert words[:3] == [f"[{i}]", str(i), "3"]
    assert words[4:] == ["cpu", "--a", flag]


def test_output_lines_of_processes_do_not_mix():
  script = "import sys\nfor i in range(200): print('x' * 300); sys.stdout.flush()"
  code, lines, err = run("--processes=4", script=script)
  assert code == 0, err
  assert sorted(lines) == [f"[{i}] " + "x" * 300 for i in range(4) for _ in range(200)]


def test_one_failure_ends_all_processes_with_its_exit_code():
  script = (
    "import os, sys, time\n"
    "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(7)\n"
    "time.sleep(60)"
  )
  begin = time.monotonic()
  code, _, err = run("--processes=3", script=script)
  assert code == 7, err
  assert time.monotonic() - begin < 20


def test_process_that_ignores_sigterm_is_killed():
  script = (
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('deaf')\n"
    "time.sleep(0.5)\n"
    "if os.environ['JAX_PROCESS_ID'] == '0': sys.exit(3)\n"
    "time.sleep(60)"
  )
  begin = time.monotonic()
  code, _, err = run("--processes=2", "--grace=1", script=script)
  assert code == 3, err
  assert time.monotonic() - begin < 20


def test_process_ended_by_a_signal_gives_128_plus_its_number():
  script = "import os; os.kill(os.getpid(), 9)"
  code, _, _ = run("--processes=1", script=script)
  assert code == 128 + 9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_every_process_once(number):
  script = (
    "import signal, sys, time\n"
    "seen = []\n"
    f"signal.signal({int(number)}, lambda n, frame: seen.append(n))\n"
    "print('ready')\n"
    "while not seen: time.sleep(0.01)\n"
    "time.sleep(0.5)\n"  # The first process to end must not end the others.
    "print('saved', len(seen))\n"
    "sys.exit(75)"
  )
  process = start("--processes=3", script=script)
  for _ in range(3):
    assert process.stdout.readline().endswith("ready\n")
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  assert sorted(out.splitlines()) == ["[0] saved 1", "[1] saved 1", "[2] saved 1"]


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (["--processes=0", "--", "true"], "--processes: '0' must be a whole number"),
    (["--devices=two", "--", "true"], "--devices: 'two'"),
    (["--proceses=2", "--", "true"], "--proceses=2"),
    (["--processes=2"], "no command"),
    (["--processes=2", "--", "no_such_program"], "'no_such_program'"),
  ],
)
def test_invalid_flags_give_one_line_and_exit_code_2(flags, text):
  result = subprocess.run(
    [sys.executable, LAUNCHER, *flags], capture_output=True, text=True, timeout=60
  )
  assert result.returncode == 2
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert text in line


def test_processes_join_through_jax():
  script = (
    "import os, jax\n"
    "jax.distributed.initialize(os.environ['JAX_COORDINATOR_ADDRESS'],\n"
    "  int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID']))\n"
    "print(jax.process_index(), jax.local_device_count(), jax.device_count())"
  )
  code, lines, err = run("--processes=2", "--devices=3", script=script)
  assert code == 0, (lines, err)
  assert {"[0] 0 3 6", "[1] 1 3 6"} <= set(lines)
