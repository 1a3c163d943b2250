"""SIGKILL and SIGTERM at random times: the resumed run ends bit-identical."""

from __future__ import annotations

import random
import signal
import time

import numpy as np
import pytest

from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.exit_codes import EXIT_TRY_AGAIN
from tests.faults import runs

NUM_STEPS = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(last state, seconds of training) of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  runs.finish(workdir)  # Fills the compilation cache.
  again = workdir.with_name("again")
  run = runs.Run(again)
  run.wait_for("^step 1/")
  start = time.monotonic()
  assert run.end() == 0
  seconds = time.monotonic() - start
  state = runs.read(again, NUM_STEPS)
  runs.assert_same(state, runs.read(workdir, NUM_STEPS))
  assert len(state) > 100 and any(np.any(array) for array in state.values())
  return state, seconds


def at_a_moment(run, seconds, seed):
  """Waits for the first step, and then for a random time."""
  run.wait_for("^step ")
  time.sleep(random.Random(seed).uniform(0, seconds))


@pytest.mark.faults(short=2, whole=30)
def test_sigkill_loses_no_saved_state(whole, fault, tmp_path):
  state, seconds = whole
  run = runs.Run(tmp_path / "run")
  at_a_moment(run, seconds, fault)
  run.kill()
  resumed = runs.finish(tmp_path / "run")
  folders = (tmp_path / "run" / "checkpoints").iterdir()
  assert all(folder.name.isdigit() for folder in folders)  # All are complete.
  done, last = run.steps(), resumed.steps()
  assert last == [] or last == list(range(last[0], NUM_STEPS + 1))
  # Checkpoints are five steps apart, and the kill may interrupt a save. So the resumed
  # run repeats fewer than ten steps.
  assert last == [] or last[0] > done[-1] - 10
  runs.assert_same(runs.read(tmp_path / "run", NUM_STEPS), state)


@pytest.mark.faults(short=1, whole=10)
def test_sigterm_saves_the_current_step(whole, fault, tmp_path):
  state, seconds = whole
  run = runs.Run(tmp_path / "run")
  at_a_moment(run, seconds / 2, fault)
  start = time.monotonic()
  run.signal(signal.SIGTERM)
  assert run.end() == EXIT_TRY_AGAIN, run.log.read_text()
  assert time.monotonic() - start < 60  # config.grace_seconds.
  saved = runs.steps_saved(tmp_path / "run")[-1]
  assert run.steps()[-1] == saved  # The resumed run repeats no logged step.
  assert runs.finish(tmp_path / "run").steps()[0] == saved + 1
  runs.assert_same(runs.read(tmp_path / "run", NUM_STEPS), state)


def test_second_sigterm_ends_immediately_and_damages_nothing(whole, tmp_path):
  run = runs.Run(tmp_path / "run", "--config.log_every=2")
  run.wait_for("^step 12/")
  saved = runs.steps_saved(tmp_path / "run")
  run.signal(signal.SIGTERM)
  run.signal(signal.SIGTERM)
  assert run.end() != 0
  assert set(saved) & set(runs.steps_saved(tmp_path / "run"))
  runs.finish(tmp_path / "run")
  runs.assert_same(runs.read(tmp_path / "run", NUM_STEPS), whole[0])


def hang_in_finish():
  """Simulates a disk that does not respond."""
  Checkpoints.finish = lambda self, *args: time.sleep(1000)


def test_run_ends_when_the_save_exceeds_grace_seconds(whole, tmp_path):
  run = runs.Run(
    tmp_path / "run",
    "--config.grace_seconds=1",
    "--config.checkpoint_every=10",
    before=hang_in_finish,
  )
  run.wait_for("^step 19/")
  start = time.monotonic()
  run.signal(signal.SIGTERM)
  assert run.end() == EXIT_TRY_AGAIN
  assert time.monotonic() - start < 15
  assert "grace_seconds = 1 " in run.log.read_text()
  runs.finish(tmp_path / "run")
  runs.assert_same(runs.read(tmp_path / "run", NUM_STEPS), whole[0])
