"""A lock that lets one run at a time use a workdir."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mdt_jax.errors import SettingError
from mdt_jax.logs import logger

LOCK = ".lock"
# Errors of file systems without locks, such as Lustre mounted without flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
# Errors that a restart would not solve.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Locks a workdir for the block, and creates the workdir if it does not exist.

  The operating system releases the lock when the process ends, even after a crash. On
  a file system without locks, `locked` logs a warning and does not lock.

  Raises:
    SettingError: another run holds the lock, or the workdir cannot be created or
      written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / LOCK).open("a+")
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
      file.seek(0)
      raise SettingError(
        "--workdir",
        str(workdir),
        f"is in use by another run: {file.read().strip()}",
      ) from None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      logger.warning(
        "%s cannot be locked (%s): make sure that no second run uses this folder",
        workdir,
        error.strerror,
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield
