"""Runs a command as one JAX run of N processes with M simulated devices each.

  python launch/local_processes.py --processes=2 --devices=4 -- \
    python -m mdt_jax.main --config=configs/digits.py --workdir=runs/two_processes

Use this script to test runs of several machines on one machine. If a process fails, the
script ends the other processes and exits with the code of the failed process. It
forwards Ctrl-C and SIGTERM to all processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

EXIT_BAD_SETTING = 2
POLL_SECONDS = 0.05


def main(argv: Sequence[str]) -> int:
  split = argv.index("--") if "--" in argv else len(argv)
  arguments, command = argv[:split], argv[split + 1 :]
  parser = _Parser(
    prog="local_processes.py",
    usage="%(prog)s [--processes=N] [--devices=M] [--grace=SECONDS] -- COMMAND …",
    description=__doc__.splitlines()[0],
    allow_abbrev=False,
  )
  parser.add_argument(
    "--processes", type=_positive, default=2, help="number of processes (2)"
  )
  parser.add_argument(
    "--devices", type=_positive, default=4, help="simulated devices per process (4)"
  )
  parser.add_argument(
    "--grace",
    type=_positive,
    default=10,
    help="seconds from the first failure until the other processes are killed (10)",
  )
  flags = parser.parse_args(arguments)
  if not command:
    parser.error("no command: give the command after --")
  return run(command, flags.processes, flags.devices, flags.grace)


def run(command: Sequence[str], processes: int, devices: int, grace: float) -> int:
  """Runs `command` in several processes that jax.distributed can connect.

  Args:
    command: program and arguments.
    processes: number of processes.
    devices: number of simulated CPU devices of each process.
    grace: seconds from the first failure until the other processes are killed.

  Returns:
    0, or the exit code of the first process that failed; 128 + n if signal n ended the
    process.
  """
  address = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen[str]] = []
  printing = threading.Lock()
  forwarded = False

  def forward(number: int, frame: object) -> None:
    nonlocal forwarded
    forwarded = True
    _signal(children, number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  for process_id in range(processes):
    environment = _environment(address, processes, process_id, devices)
    try:
      child = _start(command, environment)
    except OSError as error:
      _signal(children, signal.SIGKILL)
      print(f"error: {command[0]!r}: {error.strerror}", file=sys.stderr)
      return EXIT_BAD_SETTING
    children.append(child)
  readers = [
    threading.Thread(target=_print_lines, args=(i, child, printing), daemon=True)
    for i, child in enumerate(children)
  ]
  for reader in readers:
    reader.start()

  code, deadline = 0, None
  while True:
    running = [child for child in children if child.poll() is None]
    if not code:
      code = next((child.returncode for child in children if child.returncode), 0)
    if not running:
      break
    if code and deadline is None:
      deadline = time.monotonic() + grace
      # A forwarded signal stops all processes already; a second signal would kill them.
      if not forwarded:
        _signal(children, signal.SIGTERM)
    if deadline is not None and time.monotonic() > deadline:
      _signal(children, signal.SIGKILL)
    time.sleep(POLL_SECONDS)
  for reader in readers:
    reader.join(timeout=grace)
  return code if code >= 0 else 128 - code


class _Parser(argparse.ArgumentParser):
  """A parser that prints errors on one line, like the commands of mdt_jax."""

  def error(self, message: str) -> NoReturn:
    """Prints a one-line error and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_SETTING)


def _positive(text: str) -> int:
  """Parses a whole number of at least 1."""
  value = int(text) if text.isdecimal() else 0
  if value < 1:
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
  return value


def _free_port() -> int:
  """A free TCP port on this machine."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def _environment(
  address: str, processes: int, process_id: int, devices: int
) -> dict[str, str]:
  """The environment variables of one process."""
  simulated = f"--xla_force_host_platform_device_count={devices}"
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {simulated}".strip(),
    "JAX_COORDINATOR_ADDRESS": address,
    "JAX_NUM_PROCESSES": str(processes),
    "JAX_PROCESS_ID": str(process_id),
    "PYTHONUNBUFFERED": "1",
  }


def _start(
  command: Sequence[str], environment: dict[str, str]
) -> subprocess.Popen[str]:
  """Starts a child process."""
  return subprocess.Popen(
    command,
    env=environment,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors="replace",
    # In its own process group, a child receives Ctrl-C once, from `forward`.
    start_new_session=True,
  )


def _signal(children: Sequence[subprocess.Popen[str]], number: int) -> None:
  """Sends a signal to the process groups of all running children."""
  for child in children:
    if child.poll() is None:
      os.killpg(child.pid, number)


def _print_lines(
  process_id: int, child: subprocess.Popen[str], printing: threading.Lock
) -> None:
  """Prints the output of a child, with the process number before each line."""
  for line in child.stdout:
    with printing:
      print(f"[{process_id}] {line.rstrip()}", flush=True)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
