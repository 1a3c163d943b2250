"""Faults in mid-run: killed reading processes, exceptions, and a deleted workdir."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from mdt_jax.data.digits import DigitsSource
from mdt_jax.errors import SettingError
from mdt_jax.exit_codes import EXIT_TRY_AGAIN
from mdt_jax.training import loop
from tests.faults import run_config, runs


def children(pid):
  """Numbers of the child processes of a process (Linux)."""
  lists = Path(f"/proc/{pid}/task").glob("*/children")
  return [int(child) for path in lists for child in path.read_text().split()]


def is_reader(pid):
  """Whether a process is one of Grain's, and not a helper of multiprocessing."""
  command = Path(f"/proc/{pid}/cmdline").read_bytes()
  return b"resource_tracker" not in command and b"forkserver" not in command


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_killed_reading_process_saves_and_stops(tmp_path):
  workdir = tmp_path / "run"
  command = runs.subprocess_of(
    workdir,
    "--config.data.num_workers=1",
    "--config.num_steps=100000",
    "--config.checkpoint_every=1000000",
  )
  while not (line := command.stdout.readline()).startswith("step 3/"):
    assert line
  (reader,) = filter(is_reader, children(command.pid))
  os.kill(reader, signal.SIGKILL)
  out, err = command.communicate(timeout=120)
  assert command.returncode == EXIT_TRY_AGAIN, out + err
  assert "a reading process was killed" in out and "Traceback" not in err
  (saved,) = runs.steps_saved(workdir)
  assert f"stopped after step {saved}" in out


class FailingSource(DigitsSource):
  """Digits, of which one cannot be read in the second epoch."""

  def __init__(self, error):
    super().__init__()
    self.error, self.reads = error, 0

  def __getitem__(self, index):
    self.reads += 1
    if self.reads > 100:
      raise self.error
    return super().__getitem__(index)


def test_exception_of_the_data_is_raised_after_a_save(tmp_path):
  error = ConnectionError("the store does not answer")
  config = run_config.get_config()
  config.checkpoint_every = 1000
  with pytest.raises(SettingError) as raised:  # names the example
    loop.train(config, tmp_path, source=FailingSource(error))
  assert raised.value.__cause__ is error
  (saved,) = runs.steps_saved(tmp_path)
  assert saved >= 2


def test_exception_of_a_hook_is_raised_after_a_save(tmp_path):
  def hook(step, state):
    if step == 3:
      raise ZeroDivisionError

  config = run_config.get_config()
  with pytest.raises(ZeroDivisionError):
    loop.train(config, tmp_path, hooks=[hook])
  assert runs.steps_saved(tmp_path) == [3]


def test_exception_after_the_workdir_is_deleted_saves_nothing(tmp_path):
  workdir = tmp_path / "run"

  def delete_and_fail(step, state):
    if step == 7:
      shutil.rmtree(workdir)
      raise FileNotFoundError(workdir)

  config = run_config.get_config()
  config.checkpoint_every = 1000
  with pytest.raises(FileNotFoundError):
    loop.train(config, workdir, hooks=[delete_and_fail])
  assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize("second", [False, True])
def test_deleted_workdir_stops_the_run_and_writes_nothing(tmp_path, second):
  workdir = tmp_path / "run"

  def delete(step, state):
    if step == 7:
      shutil.rmtree(workdir)
      if second:  # another run has begun there
        workdir.mkdir()
        (workdir / ".lock").write_text("process 1 on another host\n")

  config = run_config.get_config()
  config.num_steps, config.checkpoint_every = 20_000, 10_000
  with pytest.raises(SettingError) as error:
    loop.train(config, workdir, hooks=[delete])
  assert error.value.setting == "--workdir"
  assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize("what", ["link", "folder", "fifo"])
def test_lock_that_is_no_file_is_refused_and_untouched(tmp_path, what):
  workdir, target = tmp_path / "run", tmp_path / "precious"
  workdir.mkdir()
  target.write_text("precious")
  lock = workdir / ".lock"
  if what == "link":
    lock.symlink_to(target)
  elif what == "folder":
    lock.mkdir()
  else:
    os.mkfifo(lock)
  with pytest.raises(SettingError) as error:
    loop.train(run_config.get_config(), workdir)
  assert error.value.setting == "--workdir"
  assert target.read_text() == "precious"
  assert [path.name for path in workdir.iterdir()] == [".lock"]
