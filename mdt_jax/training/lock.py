"""One run at a time in a workdir."""

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
# As on Lustre, where it is mounted without flock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
# What a start of the same run a minute later would meet again.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds a workdir, which is made if need be, until the process ends or this does.

  The lock is the system's: it goes with the process, however that ends. On a file
  system without locks there is a warning, and none.

  Raises:
    SettingError: another run holds it; or it may not be made or written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / LOCK).open("a+")
  except OSError as error:
    if error.errno not in REFUSALS:
      raise
    raise SettingError(
      "--workdir", str(workdir), f"cannot be made or written: {error.strerror}"
    ) from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise SettingError(
        "--workdir",
        str(workdir),
        f"another run is at work on it: {file.read().strip()}",
      ) from None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      logger.warning(
        "%s cannot be locked (%s): a second run there is not noticed",
        workdir,
        error.strerror,
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield
