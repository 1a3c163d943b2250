"""One run at a time in a workdir."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mdt_jax.errors import SettingError

LOCK = ".lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
  """Holds a workdir, which is made if need be, until the process ends or this does.

  The lock is the system's: it goes with the process, however that ends.

  Raises:
    SettingError: another run holds it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / LOCK).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise SettingError(
        "--workdir",
        str(workdir),
        f"another run is at work on it: {file.read().strip()}",
      ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield
