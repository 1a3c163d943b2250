"""Several processes as one run, by jax.distributed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mdt_jax.errors import SettingError

EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: launchers start the process once more
SHOWN_DIFFERENCES = 5


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  detect: bool = False,
  timeout: int = 300,
) -> None:
  """Joins the other processes of a run; without any, does nothing.

  Args:
    coordinator_address: HOST:PORT of process 0; $JAX_COORDINATOR_ADDRESS unless given.
    num_processes: of the run; $JAX_NUM_PROCESSES.
    process_id: of this one, from 0; $JAX_PROCESS_ID.
    detect: take what is not given from the metadata of a TPU pod, from Slurm, GKE or
      Open MPI, as JAX finds them.
    timeout: seconds to wait for the others; then the process ends with
      `EXIT_TRY_AGAIN` and a line that names the address.

  Raises:
    SettingError: some of the three are missing or out of range.
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
    raise SettingError("--process_id", process_id, f"must lie in [0, {num_processes})")
  with _deadline(timeout, f"--coordinator_address = {coordinator_address!r}"):
    try:
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        # With all three given, JAX need not look for a cluster, which hides devices.
        cluster_detection_method="deactivate" if None not in given else None,
        initialization_timeout=2 * timeout,  # `_deadline` speaks first
      )
    except (ValueError, RuntimeError) as error:
      raise SettingError(
        "--distributed", detect, f"the processes cannot join: {error}"
      ) from None


def process_index() -> int:
  """As jax.process_index(), without starting the devices where there is one process."""
  return jax.process_index() if jax.distributed.is_initialized() else 0


def check_same_config(config: ConfigDict) -> None:
  """Raises SettingError on every process, where one has another config than the first.

  Every process of the run has to call it.
  """
  if jax.process_count() == 1:
    return
  own = np.frombuffer(_as_json(config).encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.array(own.size)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: own.size] = own
  every = multihost_utils.process_allgather(padded)
  first, *others = (
    json.loads(bytes(text[:size])) for text, size in zip(every, sizes, strict=True)
  )
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


def any_process(*here: bool) -> tuple[bool, ...]:
  """For each flag, whether it holds on any process; all processes call this."""
  if jax.process_count() == 1:
    return here
  found = multihost_utils.process_allgather(np.array(here))
  return tuple(bool(any_of) for any_of in found.any(axis=0))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Makes all processes raise where one of them raises, so that none waits for it.

  Raises:
    Exception: of this process. Where it is well and another one has raised,
      SettingError if that did, and else RuntimeError: they end with one exit code.
  """
  error: Exception | None = None
  try:
    yield
  except Exception as raised:
    error = raised
  if jax.process_count() > 1:
    here = np.array([error is not None, isinstance(error, SettingError)])
    failed, can_be_mended = multihost_utils.process_allgather(here).T
    if failed.any() and error is None:
      first = int(np.argmax(failed))
      text = "this process stopped with an error, so all do: its output says why"
      if can_be_mended[first]:
        error = SettingError("--process_id", first, text)
      else:
        error = RuntimeError(f"process {first}: {text}")
  if error is not None:
    raise error


def _as_json(config: ConfigDict) -> str:
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
  if value is not None or name not in os.environ:
    return value
  try:
    return int(os.environ[name])
  except ValueError:
    raise SettingError(
      setting, os.environ[name], f"must be a whole number (${name})"
    ) from None


def _check_address(address: str) -> None:
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise SettingError("--coordinator_address", address, "must be HOST:PORT")


@contextlib.contextmanager
def _deadline(seconds: float, setting: str) -> Iterator[None]:
  """Ends the process with one line after `seconds`; JAX would abort it with a stack."""

  def give_up() -> None:
    print(
      f"error: {setting}: the processes did not meet there within {seconds} s",
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
