"""Standard output that fails: dropped without a reader, tried again on a full disk."""

from __future__ import annotations

import errno
import os
import stat
from types import SimpleNamespace

import pytest

from mdt_jax.cli.streams import RobustStream


class Failing:
  """A stream on a file whose next write fails."""

  encoding = "utf-8"

  def __init__(self, path, number):
    self.file = path.open("w")
    self.error = OSError(number, os.strerror(number))

  def fileno(self):
    return self.file.fileno()

  def write(self, text):
    if self.error is not None:
      error, self.error = self.error, None
      raise error
    return self.file.write(text)

  def flush(self):
    self.file.flush()


@pytest.mark.parametrize(
  ("number", "expected"),
  [(errno.ENOSPC, "second"), (errno.EFBIG, "second"), (errno.EPIPE, "")],
)
def test_text_after_an_error_is_written_if_the_stream_has_a_reader(
  tmp_path, number, expected
):
  stream = RobustStream(Failing(tmp_path / "log", number))
  assert stream.write("first") == len("first")
  stream.write("second")
  stream.flush()
  assert (tmp_path / "log").read_text() == expected


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, ""), (False, "second")])
def test_io_error_drops_the_text_of_a_closed_terminal_only(
  tmp_path, monkeypatch, is_terminal, expected
):
  kind = stat.S_IFCHR if is_terminal else stat.S_IFREG
  stream = RobustStream(Failing(tmp_path / "log", errno.EIO))
  with monkeypatch.context() as patched:
    patched.setattr(os, "fstat", lambda _: SimpleNamespace(st_mode=kind))
    stream.write("first")
  stream.write("second")
  stream.flush()
  assert (tmp_path / "log").read_text() == expected
