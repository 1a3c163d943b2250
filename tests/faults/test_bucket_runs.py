"""Runs in a bucket: killed, without their server, or two in one workdir."""

from __future__ import annotations

import random
import time

import pytest
from etils import epath

from mdt_jax.checkpoints import lease, manager
from mdt_jax.exit_codes import EXIT_BAD_SETTING
from mdt_jax.training.metric_lines import read_lines
from tests.fake_bucket import FakeBucket
from tests.faults import runs

NUM_STEPS = 30


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
  """(last state, seconds of training) of a run in a local folder."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  run = runs.Run(workdir)
  run.wait_for("^step 1/")
  start = time.monotonic()
  assert run.end() == 0, run.log.read_text()
  return runs.read(workdir, NUM_STEPS), time.monotonic() - start


@pytest.fixture
def options(bucket_environment, tmp_path):
  """Options of `runs.Run` for a workdir in the bucket."""
  return {"environment": bucket_environment, "logs": tmp_path}


@pytest.mark.faults(short=1, whole=10)
def test_sigkill_loses_no_saved_state(local_run, bucket, options, fault):
  state, seconds = local_run
  workdir = epath.Path(bucket)
  run = runs.Run(workdir, **options)
  run.wait_for("^step ")
  # Saves to a bucket take longer than those to a disk.
  time.sleep(random.Random(fault).uniform(0, 3 * seconds))
  run.kill()
  resumed = runs.finish(workdir, **options)
  done, last = run.steps(), resumed.steps()
  assert last == [] or last == list(range(last[0], NUM_STEPS + 1))
  assert last == [] or last[0] > done[-1] - 10  # as in test_kill.py
  runs.assert_same(runs.read(workdir, NUM_STEPS), state)
  lines = [line["step"] for line in read_lines(workdir / "metrics.jsonl")]
  assert lines == sorted(set(lines)) and lines[-1] == NUM_STEPS


def give_up_soon():
  """Makes a save wait two seconds for the previous one."""
  manager.PATIENCE = 2.0


@pytest.mark.faults(short=1, whole=3)
def test_run_goes_on_while_the_server_is_away(local_run, tmp_path, fault):
  server = FakeBucket(tmp_path)
  options = {"environment": server.environment, "logs": tmp_path}
  workdir = f"{server.root}/run"
  try:
    run = runs.Run(epath.Path(workdir), before=give_up_soon, **options)
    run.wait_for("^step 1[1-4]/")
    time.sleep(fault * 0.1)
    server.kill()
    time.sleep(10 if fault == 0 else 30)
    steps = run.steps()
    server.start()
    assert run.end() == 0, run.log.read_text()
  finally:
    server.kill()
  assert steps[-1] > 15  # it did not wait for the server
  assert "Training continues" in run.log.read_text()
  objects = tmp_path / "objects" / "bucket" / "run"
  runs.assert_same(runs.read(objects, NUM_STEPS), local_run[0])


def renew_often():
  lease.RENEWAL = 0.2


def test_second_run_in_a_workdir_is_refused(bucket, options):
  many = "--config.num_steps=100000"
  first = runs.Run(epath.Path(bucket), many, before=renew_often, **options)
  first.wait_for("^step ")
  second = runs.Run(epath.Path(bucket), many, **options)
  assert second.end() == EXIT_BAD_SETTING, second.log.read_text()
  first.kill()
  (error,) = [x for x in second.log.read_text().splitlines() if x.startswith("error")]
  assert f"--workdir = '{bucket}': is in use" in error
  assert f"process {first.pid} on " in error
