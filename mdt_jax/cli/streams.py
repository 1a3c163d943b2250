"""Standard output and error that survive a closed pipe and any character."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import TextIO

GONE = (errno.EPIPE, errno.EBADF, errno.ENXIO)  # of pipes and terminals


class RobustStream(io.TextIOBase):
  """A text stream that drops what cannot be written any more.

  The reader of a pipe may end early, as in `python -m mdt_jax.sample … | head`, and a
  closed terminal takes its output away. The command then goes on without output.
  Characters that the encoding of the stream lacks are written as escapes.

  Args:
    stream: standard output or standard error.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str) -> object:
    return getattr(self._stream, name)

  @property
  def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
    return self._stream.encoding

  def fileno(self) -> int:
    return self._stream.fileno()

  def isatty(self) -> bool:
    return self._stream.isatty()

  def writable(self) -> bool:
    return True

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except OSError as error:
      self._drop(error)
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError as error:
      self._drop(error)

  def _drop(self, error: OSError) -> None:
    """Connects a stream without a reader to nothing; Python's last flush then succeeds.

    After other errors, such as a full disk, the next text is tried again.
    """
    if not self._is_gone(error):
      return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, self._stream.fileno())
    os.close(nothing)

  def _is_gone(self, error: OSError) -> bool:
    """Whether no text can be written to the stream any more."""
    if error.errno != errno.EIO:
      return error.errno in GONE
    # A terminal that was closed gives EIO for good, a file on a network disk may not.
    return stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)


def make_robust() -> None:
  """Replaces sys.stdout and sys.stderr by robust streams."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if isinstance(
      stream, io.TextIOWrapper
    ):  # and not what a test or notebook put there
      stream.reconfigure(errors="backslashreplace")
      setattr(sys, name, RobustStream(stream))
