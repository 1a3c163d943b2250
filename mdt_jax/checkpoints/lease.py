"""The lock of a workdir in a bucket: an object that its run writes again and again.

A bucket has no locks that end with their process. So a lock holds for LEASE seconds
after its last renewal. A run that finds a lock watches it: a renewal shows that another
run is alive; without one within the lease, the run takes the lock over. Writing depends
on the generation of the object, which the bucket changes with each write, so of several
runs one alone gets the lock. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from mdt_jax.buckets import describe_error, may_pass, one_line_errors
from mdt_jax.errors import SettingError, one_line
from mdt_jax.logs import logger

LEASE = 60.0  # seconds after its last renewal that a lock holds
DAY = 86_400.0
RENEWAL = 15.0  # seconds between renewals
POLL = 2.0  # seconds between looks at the lock of another run
TIMEOUT = 10.0  # seconds for an answer of the bucket
SETTING = "--workdir"
_R = TypeVar("_R")


class Lease:
  """The lock of a workdir in a bucket, held by this process; see `leased`.

  Args:
    path: path of the lock's object.
  """

  def __init__(self, path: epath.Path):
    storage: Any = importlib.import_module("google.cloud.storage")
    self._errors: Any = importlib.import_module("google.api_core.exceptions")
    self._path = path
    # Without retries: `_run` and `_patiently` try again themselves.
    self._options = {"timeout": TIMEOUT, "retry": None}
    # Credentials of a person may name no project, which only lists of buckets need.
    self._storage, self._client = storage, storage.Client(project=None)
    self._token = secrets.token_hex(4)
    self._generation = 0  # of the object, as this run has written it
    self._is_lost = False
    self._ends = threading.Event()
    self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

  def is_lost(self) -> bool:
    """Whether the workdir was deleted, or belongs to another run by now."""
    return self._is_lost

  def check_role(self) -> None:
    """Asks for the bucket's properties, as Orbax does when it deletes a checkpoint.

    Without the permission storage.buckets.get, a run would fail hours after its start.
    """
    self._client.get_bucket(self._object().bucket.name, **self._options)

  def acquire(self) -> None:
    """Takes the lock, and starts to renew it.

    Waits for up to `LEASE` seconds if another run has left its lock behind.

    Raises:
      SettingError: another run holds the lock.
      Exception: the bucket cannot be used, or has not answered for `LEASE` seconds.
    """
    seen = 0  # generation of another run's lock
    deadline = 0.0
    while not self._patiently(functools.partial(self._write, seen)):
      found, owner = self._patiently(self._look)
      if owner.get("token") == self._token:  # the answer to `_write` was lost
        self._generation = found
        break
      if found == 0:  # the other run has ended
        seen = 0
        continue
      if seen not in (0, found):
        raise SettingError(
          SETTING, str(self._path.parent), f"is in use by another run: {_shown(owner)}"
        )
      if seen == 0:
        seen, deadline = found, time.monotonic() + _lease_of(owner)
        if _has_ended(owner):
          continue
        logger.info(
          "%s is locked by %s: waiting for up to %.0f s whether it is alive",
          self._path.parent,
          _shown(owner),
          _lease_of(owner),
        )
      while time.monotonic() < deadline and found == seen:
        time.sleep(POLL)
        found, owner = self._patiently(self._look)
      if found == seen:
        logger.warning("taking over the lock of %s, which is gone", _shown(owner))
    self._thread.start()

  def release(self) -> None:
    """Stops to renew the lock, and deletes it if it is still this run's."""
    self._ends.set()
    if not self._thread.is_alive():
      return
    self._thread.join()
    if self._is_lost:
      return
    with contextlib.suppress(Exception):  # the lease ends by itself
      self._object().delete(if_generation_match=self._generation, **self._options)

  def _run(self) -> None:
    """Renews the lock until `release`, or until it is lost."""
    last = time.monotonic()
    while not self._ends.wait(RENEWAL) and not self._is_lost:
      try:
        self._renew()
      except Exception as error:  # the bucket does not answer just now
        silent = time.monotonic() - last
        if silent > LEASE:
          logger.error(
            "THE LOCK IS NOT RENEWED for %.0f s, and another run may take the workdir "
            "over: %s",
            silent,
            describe_error(error, self._path),
          )
      else:
        last = time.monotonic()

  def _patiently(self, request: Callable[[], _R]) -> _R:
    """Repeats a request for up to `LEASE` seconds while the bucket does not answer."""
    deadline = time.monotonic() + LEASE
    while True:
      try:
        return request()
      except Exception as error:  # those of several libraries
        if not may_pass(error) or time.monotonic() > deadline:
          raise
      time.sleep(POLL)

  def _renew(self) -> None:
    """Writes the lock again; sets `_is_lost` if it is no longer this run's."""
    if self._write(self._generation):
      return
    # The answer to an earlier renewal may have been lost on its way.
    found, owner = self._look()
    if owner.get("token") == self._token:
      self._generation = found
    else:
      self._is_lost = True

  def _write(self, generation: int) -> bool:
    """Writes the lock if the object has this generation; 0: if there is none."""
    owner = {
      "owner": f"process {os.getpid()} on {socket.gethostname()}",
      "token": self._token,
      "process": _identity(os.getpid()),
      "lease": LEASE,
    }
    written = self._object()
    try:
      written.upload_from_string(
        json.dumps(owner), if_generation_match=generation, **self._options
      )
    except self._errors.PreconditionFailed:
      return False
    self._generation = written.generation
    return True

  def _look(self) -> tuple[int, dict[str, Any]]:
    """The generation of the lock, 0 for none, and what its owner has written."""
    found = self._object()
    try:
      found.reload(**self._options)
      generation = found.generation
      content = self._object().download_as_bytes(**self._options)
    except self._errors.NotFound:
      return 0, {}
    # If the lock has changed in between, writing over this generation fails.
    with contextlib.suppress(ValueError):
      owner = json.loads(content)
      if isinstance(owner, dict):
        return generation, owner
    return generation, {}

  def _object(self) -> Any:
    """The lock's object, anew: one that was read asks for the same generation again."""
    return self._storage.Blob.from_uri(str(self._path), client=self._client)


@contextlib.contextmanager
def leased(path: epath.Path) -> Iterator[Lease]:
  """Holds the lock of a workdir for the block.

  Args:
    path: path of the lock's object.

  Raises:
    SettingError: another run holds the lock, the bucket cannot be used, or
      google-cloud-storage is not installed.
    DataUnavailable: the bucket does not answer.
  """
  try:
    importlib.import_module("google.cloud.storage")
  except ImportError as error:
    raise SettingError(
      SETTING,
      str(path.parent),
      f"needs google-cloud-storage ({one_line(error)}): pip install -e '.[gcs]'",
    ) from None
  with one_line_errors(SETTING, path.parent):
    lease = Lease(path)
    lease.check_role()
    lease.acquire()
  try:
    yield lease
  finally:
    lease.release()


def _identity(pid: int) -> str | None:
  """Names a process of this machine, or of this container; None without /proc.

  The number of a process alone may belong to a process of another machine.
  """
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid}"
  except OSError:
    return None


def _has_ended(owner: dict[str, Any]) -> bool:
  """Whether the owner of a lock was a process of this machine that is gone."""
  identity = str(owner.get("process") or "")
  pid = identity.rpartition(" ")[2]
  if not pid.isdigit() or identity != _identity(int(pid)):
    return False
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return int(pid) == os.getpid()  # an earlier run of this process


def _lease_of(owner: dict[str, Any]) -> float:
  """Seconds that the lock of an owner holds, at most those of a day.

  A damaged lock may hold no number, NaN or Infinity.
  """
  lease = owner.get("lease")
  if not isinstance(lease, int | float) or math.isnan(lease):
    return LEASE
  return min(max(0.0, float(lease)), DAY)


def _shown(owner: dict[str, Any]) -> str:
  """The owner of a lock, for messages."""
  return one_line(str(owner.get("owner") or "an unknown process"), 200)
