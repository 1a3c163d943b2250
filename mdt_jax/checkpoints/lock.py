"""A lock that lets one run at a time use a workdir."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from mdt_jax.buckets import AnyPath
from mdt_jax.checkpoints.lease import leased
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger, printable
from mdt_jax.paths import open_regular

try:
  import fcntl
except ModuleNotFoundError:
  raise ImportError("mdt_jax needs Linux or macOS; on Windows, use WSL") from None

LOCK = ".lock"
# Errors of file systems without locks, such as Lustre mounted without flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
# Errors that a restart would not solve.
REFUSALS = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
  *(errno.EISDIR, errno.ELOOP, errno.ENXIO),  # .lock is a folder, a link, a socket
)
MAX_OWNER = 200  # bytes of another run's file that an error shows


class Lock(Protocol):
  """The lock of a workdir, held by this process; see `locked`."""

  def is_lost(self) -> bool:
    """Whether the workdir was deleted, or belongs to another run by now."""
    ...


class LocalLock:
  """The lock of a local workdir; see `Lock`.

  Args:
    path: the file of the lock.
    owner: what `locked` has written to the file.
  """

  def __init__(self, path: Path, owner: bytes):
    self._path, self._owner = path, owner

  def is_lost(self) -> bool:
    """Whether the workdir was deleted, or belongs to another run by now."""
    try:
      return self._path.read_bytes() != self._owner
    except (FileNotFoundError, NotADirectoryError):
      return True
    except OSError:  # the file system does not answer just now
      return False


@contextlib.contextmanager
def locked(workdir: AnyPath) -> Iterator[Lock]:
  """Locks a workdir for the block, and creates the workdir if it does not exist.

  The operating system releases the lock when the process ends, even after a crash. On
  a file system without locks, `locked` logs a warning and does not lock. In a bucket,
  the lock is a lease, see `lease`.

  Raises:
    SettingError: another run holds the lock, or the workdir cannot be created or
      written.
  """
  if not isinstance(workdir, Path):
    with leased(workdir / LOCK) as lease:
      yield lease
    return
  path = workdir / LOCK
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # "w" would empty the file of a run that holds the lock.
    file = open(open_regular(path, os.O_RDWR | os.O_CREAT), "rb+")  # noqa: SIM115
  except OSError as error:
    if error.errno not in REFUSALS:
      raise
    raise SettingError(
      "--workdir", str(workdir), f"cannot be created or written: {error.strerror}"
    ) from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise SettingError(
        "--workdir",
        str(workdir),
        f"is in use by another run: {_shown(file.read(MAX_OWNER))}",
      ) from None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      logger.warning(
        "%s cannot be locked (%s): make sure that no second run uses this folder",
        workdir,
        error.strerror,
      )
    # The token tells this start from another process with the same number.
    token = secrets.token_hex(4)
    text = f"process {os.getpid()} on {socket.gethostname()} ({token})\n"
    owner = text.encode(errors="replace")
    file.truncate(0)
    file.write(owner)
    file.flush()
    yield LocalLock(path, owner)


def _shown(owner: bytes) -> str:
  """What the file of another run holds, for an error of one line."""
  return " ".join(printable(owner.decode(errors="replace")).split())
