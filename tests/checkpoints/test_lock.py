"""The lock of a workdir, and workdirs that are refused."""

import errno
import fcntl
import os
import re
import time
from pathlib import Path

import pytest

from mdt_jax.checkpoints import lock
from mdt_jax.checkpoints.lock import locked
from mdt_jax.errors import SettingError
from tests import forked


def hold(folder):
  with locked(folder):
    print("held")
    time.sleep(60)


def test_error_of_a_second_run_names_the_running_process(tmp_path):
  with locked(tmp_path), pytest.raises(SettingError) as error, locked(tmp_path):
    pass
  assert error.value.setting == "--workdir"
  assert f"process {os.getpid()} on " in error.value.accepted


def test_lock_ends_when_its_process_is_killed(tmp_path):
  process = forked.Forked(hold, tmp_path)
  process.wait_for("held")
  refused = pytest.raises(SettingError, match=f"process {process.pid} on")
  with refused, locked(tmp_path):
    pass
  process.kill()
  with locked(tmp_path):
    pass


def raiser(number):
  def fail(*args, **kwargs):
    raise OSError(number, os.strerror(number))

  return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_workdir_without_permission_is_refused(tmp_path, monkeypatch, number):
  monkeypatch.setattr(Path, "mkdir", raiser(number))
  message = rf"--workdir = .*{re.escape(os.strerror(number))}"
  with pytest.raises(SettingError, match=message), locked(tmp_path / "run"):
    pass


def test_workdir_below_a_file_is_refused(tmp_path):
  (tmp_path / "file").touch()
  refused = pytest.raises(SettingError, match=r"--workdir = .*Not a directory")
  with refused, locked(tmp_path / "file" / "run"):
    pass


def test_io_error_is_not_reported_as_a_setting_error(tmp_path, monkeypatch):
  monkeypatch.setattr(Path, "mkdir", raiser(errno.EIO))
  with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path):
    pass


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
  monkeypatch.setattr(fcntl, "flock", raiser(errno.ENOSYS))
  lines = []
  monkeypatch.setattr(lock.logger, "warning", lambda text, *args: lines.append(text))
  with locked(tmp_path):
    assert (tmp_path / lock.LOCK).read_text().startswith(f"process {os.getpid()} on")
  assert len(lines) == 1 and "cannot be locked" in lines[0]


def test_lock_file_may_hold_any_bytes(tmp_path):
  with locked(tmp_path) as held:
    (tmp_path / lock.LOCK).write_bytes(b"\xff\n\xfe")
    assert held.is_lost()
    with pytest.raises(SettingError) as error, locked(tmp_path):
      pass
    assert len(str(error.value).splitlines()) == 1
