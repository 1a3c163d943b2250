"""Runs that span several processes, with jax.distributed."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mdt_jax.errors import DataUnavailable, SettingError
from mdt_jax.exit_codes import EXIT_TRY_AGAIN

HEARTBEAT_SECONDS = 30  # after which a silent process counts as lost; JAX's own: 100
LONGEST_WAIT = 7 * 24 * 3600  # seconds of `wait_for_all`
# What the collectives of CPUs and GPUs, and JAX's own messages, say of a lost process.
_LOST = re.compile(
  r"^(UNKNOWN|INTERNAL|UNAVAILABLE|FAILED_PRECONDITION|ABORTED)\b.*"
  r"(Gloo|NCCL|closed by peer|[Cc]onnection reset|[Hh]eartbeat|UNAVAILABLE)",
  re.DOTALL,
)
LOST = "error: another process of the run was lost: repeat the command on all of them"
_handlers: list[Any] = []  # C functions, which must outlive their registration
_TASKS = Path("/proc/self/task")  # on Linux: a folder for each thread of this process
SHOWN_DIFFERENCES = 5  # settings that the error of `check_same_config` lists


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  detect: bool = False,
  timeout: int = 300,
) -> None:
  """Connects this process to the other processes of the run.

  Does nothing if no argument and no environment variable describes other processes.

  Args:
    coordinator_address: HOST:PORT of process 0. Default: $JAX_COORDINATOR_ADDRESS.
    num_processes: number of processes of the run. Default: $JAX_NUM_PROCESSES.
    process_id: number of this process, from 0. Default: $JAX_PROCESS_ID.
    detect: let JAX detect the missing arguments from the metadata of a TPU pod, or
      from Slurm, GKE or Open MPI.
    timeout: seconds to wait for the other processes. After that, this process prints
      an error and exits with `EXIT_TRY_AGAIN`.

  Raises:
    SettingError: an argument is missing or out of range, or JAX cannot connect.
  """
  coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  num_processes = _from_environment(
    "--num_processes", num_processes, "JAX_NUM_PROCESSES"
  )
  process_id = _from_environment("--process_id", process_id, "JAX_PROCESS_ID")
  given = (coordinator_address, num_processes, process_id)
  if not detect:
    if given == (None, None, None):
      return
    for name, value in zip(
      ("--coordinator_address", "--num_processes", "--process_id"), given, strict=True
    ):
      if value is None:
        raise SettingError(name, None, "must be given with the other two")
  if coordinator_address is not None:
    _check_address(coordinator_address)
  if num_processes is not None and num_processes < 1:
    raise SettingError("--num_processes", num_processes, "must be at least 1")
  if process_id is not None and not 0 <= process_id < (num_processes or math.inf):
    accepted = "must be at least 0"
    if num_processes is not None:
      accepted = f"must lie in [0, {num_processes})"
    raise SettingError("--process_id", process_id, accepted)
  before = _threads()
  with _deadline(timeout, f"--coordinator_address = {coordinator_address!r}"):
    try:
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        # With all three arguments JAX needs no detection, which would hide devices.
        cluster_detection_method="deactivate" if None not in given else None,
        initialization_timeout=2 * timeout,  # `_deadline` ends the process before
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      )
    except (ValueError, RuntimeError) as error:
      raise SettingError(
        "--distributed", detect, f"the processes cannot connect: {error}"
      ) from None
  if jax_distributed.global_state.num_processes > 1:
    _exit_when_jax_aborts(_threads() - before)


def wait_for_all() -> None:
  """Waits until every process of the run calls this function, for `LONGEST_WAIT`.

  A process calls this function when its work is done and before it exits. JAX's own
  wait at the exit ends after 5 minutes and then aborts all processes, although a
  process may have hours of work left. Heartbeats still find a lost process meanwhile.

  Raises:
    JaxRuntimeError: another process was lost.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return
  done = futures.Future[None]()

  def wait() -> None:
    try:
      client.wait_at_barrier("mdt_jax: the work is done", LONGEST_WAIT * 1000)
    except Exception as error:
      done.set_exception(error)
    else:
      done.set_result(None)

  # The main thread stays free to handle signals.
  threading.Thread(target=wait, daemon=True).start()
  done.result()


def is_loss(error: Exception) -> bool:
  """Whether an exception of JAX says that another process of the run was lost."""
  # gloo's errors are ValueErrors with the status of an error of XLA.
  is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
  return is_of_jax and _LOST.search(str(error)) is not None


def is_joined() -> bool:
  """Whether `start` has connected this process to others."""
  return jax.distributed.is_initialized()


def process_index() -> int:
  """jax.process_index(), which does not start the devices of a single process."""
  return jax.process_index() if is_joined() else 0


def check_same_config(config: ConfigDict) -> None:
  """Raises SettingError on all processes if their configs differ.

  All processes of the run must call this function together.
  """
  if jax.process_count() == 1:
    return
  first, *others = map(json.loads, _gather_texts(_as_json(config)))
  differences = [
    f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on {process}"
    for process, other in enumerate(others, 1)
    for name in sorted({*first, *other})
    if first.get(name) != other.get(name)
  ]
  if differences:
    raise SettingError(
      "--config",
      "of this run",
      "must be the same on every process: "
      + "; ".join(differences[:SHOWN_DIFFERENCES]),
    )


def check_same_weights(path: str, checksum: str | None) -> None:
  """Raises SettingError on all processes if they have opened different weights.

  A path may lie on a disk of each machine, or an address of the hub be downloaded at
  different times. All processes of the run must call this function together.

  Args:
    path: `config.init.path`.
    checksum: checksum of the weights on this process; None where none are opened.
  """
  if jax.process_count() == 1:
    return
  found = _gather_texts(checksum or "")
  if len(set(found) - {""}) > 1:
    raise SettingError(
      "config.init.path",
      path,
      "must hold the same weights on every process; the CRC-32 are "
      + ", ".join(text or "none" for text in found[:SHOWN_DIFFERENCES]),
    )


def _gather_texts(own: str) -> list[str]:
  """Returns the text of each process."""
  data = np.frombuffer(own.encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.array(data.size)))
  padded = np.zeros(max(1, sizes.max()), np.uint8)
  padded[: data.size] = data
  every = multihost_utils.process_allgather(padded)
  return [bytes(text[:size]).decode() for text, size in zip(every, sizes, strict=True)]


def any_process(*here: bool) -> tuple[bool, ...]:
  """For each flag, whether the flag is true on any process.

  All processes must call this function together, with the same number of flags.
  """
  if jax.process_count() == 1:
    return here
  found = multihost_utils.process_allgather(np.array(here))
  return tuple(bool(any_of) for any_of in found.any(axis=0))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Makes all processes raise if one process raises inside the block.

  Otherwise the other processes would wait for the failed process forever.

  Raises:
    Exception: the exception of this process. A process without an exception raises
      SettingError or DataUnavailable if the first failed process raised this type, and
      RuntimeError otherwise, so all processes end with the same exit code.
  """
  error: Exception | None = None
  try:
    yield
  except Exception as raised:
    error = raised
  if jax.process_count() > 1:
    kinds = (Exception, SettingError, DataUnavailable)
    here = np.array([isinstance(error, kind) for kind in kinds])
    failed, can_be_mended, may_pass = multihost_utils.process_allgather(here).T
    if failed.any() and error is None:
      first = int(np.argmax(failed))
      text = "this process failed and stops all processes; see its output"
      if can_be_mended[first]:
        error = SettingError("--process_id", first, text)
      elif may_pass[first]:
        error = DataUnavailable(f"process {first}: {text}")
      else:
        error = RuntimeError(f"process {first}: {text}")
  if error is not None:
    raise error


def _threads() -> set[int]:
  """Numbers of the threads of this process; empty where there is no /proc."""
  return {int(task.name) for task in _TASKS.glob("*")}


def _exit_when_jax_aborts(watching: set[int]) -> None:
  """Makes this process exit with `EXIT_TRY_AGAIN` when JAX aborts it over a loss.

  JAX's client of the coordinator aborts when another process is lost, from a thread of
  its own, where Python handles no signals. So the handler is one of C. Any other abort,
  such as that of a failed check in XLA, ends the process as if there were no handler,
  because a restart might fail in the same way forever.

  Args:
    watching: numbers of the threads of JAX's client; empty if they are not known. Every
      abort then counts as a loss.
  """
  main = threading.main_thread().native_id
  exits = threading.Event()
  atexit.register(exits.set)  # runs before the functions that JAX registered earlier

  def handle(number: int) -> None:
    thread = threading.get_native_id()
    # At the exit, the main thread tells the coordinator that this process ends.
    is_leaving = thread == main and exits.is_set()
    if not watching or thread in watching or is_leaving:
      os.write(2, f"{LOST}\n".encode())
      os._exit(EXIT_TRY_AGAIN)
    libc.signal(number, None)  # SIG_DFL
    os.kill(os.getpid(), number)  # takes effect when this function has returned

  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(handle))
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  libc.signal(signal.SIGABRT, ctypes.cast(_handlers[-1], ctypes.c_void_p))


def _as_json(config: ConfigDict) -> str:
  """JSON of {"config.x.y": value} for each setting of a config."""
  flat: dict[str, Any] = {}

  def add(prefix: str, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
      if isinstance(value, dict):
        add(f"{prefix}{name}.", value)
      else:
        flat[prefix + name] = value

  add("config.", config.to_dict())
  return json.dumps(flat, sort_keys=True)


def _from_environment(setting: str, value: int | None, name: str) -> int | None:
  """`value`, or the integer in the environment variable `name` if value is None."""
  if value is not None or name not in os.environ:
    return value
  try:
    return int(os.environ[name])
  except ValueError:
    raise SettingError(
      setting, os.environ[name], f"must be a whole number (${name})"
    ) from None


def _check_address(address: str) -> None:
  """Raises SettingError unless `address` is HOST:PORT."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise SettingError("--coordinator_address", address, "must be HOST:PORT")
  if len(port) > 5 or not 1 <= int(port) <= 65_535:
    raise SettingError(
      "--coordinator_address", address, "must have a port in [1, 65,535]"
    )


@contextlib.contextmanager
def _deadline(seconds: float, setting: str) -> Iterator[None]:
  """Ends the process with a one-line error if the block takes longer than `seconds`.

  JAX's own timeout would abort the process with a stack trace.
  """

  def give_up() -> None:
    print(
      f"error: {setting}: not all processes connected within {seconds} s",
      file=sys.stderr,
      flush=True,
    )
    os._exit(EXIT_TRY_AGAIN)

  timer = threading.Timer(seconds, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
