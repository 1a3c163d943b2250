"""The lock of a workdir in a bucket, which holds as long as its run renews it."""

from __future__ import annotations

import json
import time

import pytest
from etils import epath

from mdt_jax.checkpoints import lease
from mdt_jax.checkpoints.lock import LOCK, locked
from mdt_jax.errors import DataUnavailable, SettingError
from tests import forked
from tests.fake_bucket import wait_for


@pytest.fixture
def workdir(bucket, monkeypatch):
  """A workdir in a bucket, whose lock is renewed ten times a second."""
  monkeypatch.setattr(lease, "RENEWAL", 0.1)
  monkeypatch.setattr(lease, "POLL", 0.02)
  return epath.Path(bucket)


def write_lock(workdir, **owner):
  """Writes the lock of a run that renews it no more."""
  owner = {"owner": "process 7 on elsewhere", "token": "other", "lease": 0.5} | owner
  (workdir / LOCK).write_text(json.dumps(owner))


def hold(workdir):
  lease.RENEWAL = 0.1
  with locked(epath.Path(workdir)):
    print("held")
    time.sleep(60)


def test_second_run_is_refused_and_told_of_the_first(workdir, bucket_environment):
  process = forked.Forked(hold, str(workdir), environment=bucket_environment)
  process.wait_for("held")
  with pytest.raises(SettingError) as error, locked(workdir):
    pass
  process.kill()
  assert (error.value.setting, error.value.value) == ("--workdir", str(workdir))
  assert f"process {process.pid} on " in error.value.accepted


def test_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(
  workdir, bucket_environment
):
  process = forked.Forked(hold, str(workdir), environment=bucket_environment)
  process.wait_for("held")
  process.kill()
  start = time.monotonic()
  with locked(workdir) as lock:
    assert not lock.is_lost()
  assert time.monotonic() - start < lease.LEASE / 2


def test_lock_of_another_machine_is_taken_over_after_its_lease(workdir):
  write_lock(workdir)
  start = time.monotonic()
  with locked(workdir) as lock:
    assert 0.5 <= time.monotonic() - start < 10
    assert not lock.is_lost()


def test_end_of_a_run_frees_the_workdir(workdir):
  with locked(workdir):
    assert (workdir / LOCK).exists()
  assert not (workdir / LOCK).exists()


def test_lock_is_renewed(workdir):
  with locked(workdir) as lock:
    first = (workdir / LOCK).stat().mtime, lock._generation
    wait_for(lambda: lock._generation != first[1])
    assert not lock.is_lost()


@pytest.mark.parametrize("change", ["taken over", "deleted"])
def test_run_notices_that_its_lock_is_gone(workdir, change):
  with locked(workdir) as lock:
    if change == "deleted":
      (workdir / LOCK).unlink()
    else:
      write_lock(workdir)
    wait_for(lock.is_lost)
  if change == "taken over":  # the end of the run leaves the lock of the other one
    assert "elsewhere" in (workdir / LOCK).read_text()


def test_renewal_whose_answer_is_lost_does_not_lose_the_lock(workdir):
  with locked(workdir) as lock:
    content = (workdir / LOCK).read_text()
    (workdir / LOCK).write_text(content)  # another generation, of the same run
    before = lock._generation
    wait_for(lambda: lock._generation != before)
    time.sleep(0.3)
    assert not lock.is_lost()


def test_first_write_whose_answer_is_lost_gets_the_lock(workdir, monkeypatch):
  write, answers = lease.Lease._write, []

  def lose_first_answer(self, generation):
    answers.append(write(self, generation))
    if len(answers) == 1:
      raise ConnectionResetError
    return answers[-1]

  monkeypatch.setattr(lease.Lease, "_write", lose_first_answer)
  start = time.monotonic()
  with locked(workdir) as lock:
    assert time.monotonic() - start < lease.LEASE / 2
    assert not lock.is_lost()


def test_bucket_that_does_not_answer_is_no_bad_setting(workdir, monkeypatch):
  def refuse(self, generation):
    raise ConnectionRefusedError

  monkeypatch.setattr(lease.Lease, "_write", refuse)
  monkeypatch.setattr(lease, "LEASE", 0.1)
  away = pytest.raises(DataUnavailable, match="does not answer")
  with away, locked(workdir):
    pass


def test_damaged_lock_is_taken_over_after_the_lease(workdir, monkeypatch):
  monkeypatch.setattr(lease, "LEASE", 0.5)
  (workdir / LOCK).write_text("no JSON")
  with locked(workdir) as lock:
    assert not lock.is_lost()


@pytest.mark.parametrize(
  ("written", "seconds"),
  [(0.5, 0.5), (-1, 0.0), (float("inf"), lease.DAY), (float("nan"), lease.LEASE)],
)
def test_lease_of_a_damaged_lock_ends(written, seconds):
  assert lease._lease_of({"lease": written}) == seconds
  assert lease._lease_of({"lease": "a"}) == lease._lease_of({}) == lease.LEASE


def test_bucket_that_is_not_there_is_refused(bucket):
  refused = pytest.raises(SettingError, match="no bucket 'missing'")
  with refused, locked(epath.Path("gs://missing/run")):
    pass
