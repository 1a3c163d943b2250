"""Reading processes that are killed again and again at one step."""

from __future__ import annotations

import pytest

from mdt_jax.training import loop
from mdt_jax.training.kills import ReaderKills
from mdt_jax.training.preemption import Interrupted
from mdt_jax.training.trainer import WORKER_KILLED
from tests.training.tiny import tiny_dit_config


def test_kill_is_repeated_until_the_run_is_past_its_step(tmp_path):
  assert not ReaderKills(tmp_path).is_repeated(5)
  again = ReaderKills(tmp_path)
  again.passed(5)
  assert again.is_repeated(5)
  assert not ReaderKills(tmp_path).is_repeated(5)  # after an end with code 1


def test_kill_after_progress_is_not_repeated(tmp_path):
  assert not ReaderKills(tmp_path).is_repeated(5)
  again = ReaderKills(tmp_path)
  again.passed(6)
  assert not list(tmp_path.iterdir())
  assert not again.is_repeated(7)


def test_damaged_or_missing_folder_counts_as_no_kill(tmp_path):
  assert not ReaderKills(tmp_path).is_repeated(5)
  (file,) = tmp_path.iterdir()
  file.write_text("{")
  assert not ReaderKills(tmp_path).is_repeated(5)
  assert not ReaderKills(tmp_path / "gone").is_repeated(5)
  assert not (tmp_path / "gone").exists()


def test_second_kill_at_a_step_ends_the_run_with_an_error(tmp_path, caplog):
  def kill(step, state):
    if step == 2:
      raise RuntimeError(f"a process {WORKER_KILLED} with exit code -9")

  def run():
    loop.train(tiny_dit_config(num_steps=4), tmp_path, hooks=[kill])

  def kill_at_the_start(loader):
    raise RuntimeError(f"a process {WORKER_KILLED} with exit code -9")

  with pytest.raises(Interrupted):
    run()
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(
      loop.Trainer, "_next_batch", lambda self, loader: kill_at_the_start(loader)
    )
    with pytest.raises(RuntimeError, match=WORKER_KILLED):
      run()
  assert "killed again" in caplog.text
  run()
