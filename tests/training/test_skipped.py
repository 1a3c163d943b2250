"""Nonfinite steps: stopping, replay, rollback."""

from __future__ import annotations

import json
import logging

import jax
import numpy as np
import pytest

from mdt_jax.checkpoints.manager import Checkpoints
from mdt_jax.data.loader import batch_indices
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.training import loop, trainer
from mdt_jax.training.metric_lines import read_lines
from mdt_jax.training.replay import replay
from mdt_jax.training.skipped import SkippedSteps
from tests.training.tiny import tiny_config

NUM_EXAMPLES = 128  # 16 batches of 8.
DIT = {"model.name": "DiT-S/2"}  # Compiles faster.
BAD_STEP = 3
BAD = batch_indices(NUM_EXAMPLES, 0, 8, BAD_STEP)[5]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Arrays. One of them is so large that its squared error is infinite."""
  folder = tmp_path_factory.mktemp("data") / "0"
  folder.mkdir()
  random = np.random.default_rng(0)
  for i in range(NUM_EXAMPLES):
    array = random.standard_normal((8, 8, 1)).astype(np.float32)
    np.save(folder / f"{i:04d}.npy", 1e30 * array if i == BAD else array)
  return folder.parent


def config_of(data, **changes):
  settings = {
    "num_steps": 6,
    "optimizer.name": "adamw",  # Compiles faster.
    "data.source": "arrays",
    "data.path": str(data),
    "max_skipped": 0,
    "checkpoints_to_keep": 9,
  }
  return tiny_config(**settings | changes)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("stopped")
  with pytest.raises(SettingError) as error:
    loop.train(config_of(data, **DIT), workdir)
  return workdir, str(error.value)


def test_too_many_skipped_steps_stop_the_run_with_a_diagnosis(stopped):
  workdir, message = stopped
  assert message.startswith("config.max_skipped = 0: ")
  for text in (f"steps {BAD_STEP} ", "checkpoint is at step 4", "--replay_step=3"):
    assert text in message
  diagnosis = json.loads((workdir / "diagnosis.json").read_text())
  (skipped,) = diagnosis["skipped"]
  assert (skipped["step"], skipped["batch"]) == (BAD_STEP, BAD_STEP)
  assert BAD in skipped["examples"]
  assert diagnosis["last_checkpoint"] == 4
  assert diagnosis["config"]["seed"] == 0


def test_replay_finds_the_bad_example(stopped, data, caplog):
  workdir, _ = stopped
  before = {p for p in workdir.rglob("*") if p.is_file()}
  with caplog.at_level(logging.INFO, "mdt_jax"):
    found = replay(config_of(data, **DIT), workdir, BAD_STEP)
  assert {p for p in workdir.rglob("*") if p.is_file()} - before == {
    workdir / "replay_3.json"
  }
  assert json.loads((workdir / "replay_3.json").read_text()) == found
  assert "replaying steps 2 to 3" in caplog.text
  # The output of the initial network is always zero, so the loss is finite.
  assert np.isfinite(found["loss"]) and found["parameters"] == []
  assert "final_layer/linear/kernel" in found["gradients"]
  (bad,) = (row for row in found["examples"] if row["largest"] > 100)
  assert bad["index"] == BAD and bad["label"] == 0


def test_replayed_step_has_its_original_loss(data, tmp_path, monkeypatch):
  losses = []
  original = trainer.Progress.add

  def add(self, done, metrics):
    losses.append(np.divide(*jax.device_get(metrics["loss"] + metrics["masked_loss"])))
    return original(self, done, metrics)

  monkeypatch.setattr(trainer.Progress, "add", add)
  # With a masked pass, of MDT, which compiles faster than MDTv2.
  config = config_of(data, num_steps=3, **{"model.name": "MDT-S/2"})
  loop.train(config, tmp_path)
  for step in (1, 2):  # From the initial state, and from the checkpoint of step 2.
    found = replay(config, tmp_path, step)
    rows = [row["loss"] + row["masked_loss"] for row in found["examples"]]
    assert found["loss"] == pytest.approx(np.mean(rows), rel=1e-6)
    assert found["loss"] == pytest.approx(2 * losses[step], rel=1e-5)


def test_replay_without_a_run_is_refused(data, tmp_path):
  with pytest.raises(SettingError, match=r"--workdir = .*'checkpoints'"):
    replay(config_of(data), tmp_path, 1)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [-1, 6])
def test_replay_of_a_step_outside_the_run_is_refused(data, tmp_path, step):
  with pytest.raises(SettingError, match=r"--replay_step"):
    replay(config_of(data), tmp_path, step)


def test_rollback_skips_the_bad_batches(data, tmp_path, caplog):
  config = config_of(data, max_rollbacks=1, log_every=1, **DIT)
  with caplog.at_level(logging.WARNING, "mdt_jax"):
    state = loop.train(config, tmp_path)
  assert "step 2, without batches 2 to 5" in caplog.text
  assert int(state.step) == 6
  assert int(state.batch_offset) == 4
  # The metrics of the steps after the checkpoint are replaced.
  steps = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")]
  assert steps == sorted(set(steps)) and steps[-1] == 6
  # The checkpoint after the bad step is moved, not deleted.
  (moved,) = (tmp_path / "damaged").iterdir()
  assert moved.name.startswith("4_")
  checkpoints = Checkpoints(tmp_path, 9)
  assert checkpoints.latest_step() == 6
  restored = checkpoints.restore(jax.eval_shape(lambda: state), build(config))
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, restored, state)

  # The expected result: a run that reads only the remaining batches.
  create_loader = trainer.create_loader
  clean = tmp_path / "clean"
  config.num_steps, config.max_rollbacks = 2, 0
  loop.train(config, clean)
  config.num_steps = 6
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      trainer,
      "create_loader",
      lambda source, start_step, **kwargs: create_loader(
        source, start_step=start_step + 4, **kwargs
      ),
    )
    expected = loop.train(config, clean)
  jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


class Killed(BaseException):
  """Ends a run without a save."""


def test_run_killed_after_a_rollback_keeps_its_batches(data, tmp_path):
  def kill_after_the_rollback(step, state):
    if int(state.batch_offset) > 0:
      raise Killed

  config = config_of(data, max_rollbacks=1, **DIT)
  with pytest.raises(Killed):
    loop.train(config, tmp_path, hooks=[kill_after_the_rollback])
  assert replay(config, tmp_path, BAD_STEP)["batch"] == BAD_STEP + 4
  config.max_rollbacks = 0  # the bad batch would stop the run
  state = loop.train(config, tmp_path)
  assert (int(state.step), int(state.batch_offset)) == (6, 4)
  config.max_rollbacks = 1
  expected = loop.train(config, tmp_path / "uninterrupted")
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
  ("max_rollbacks", "checkpoint_every", "skipped"),
  # No checkpoint to roll back to; the bad example comes again in the next epoch.
  [(2, 30, "steps 3 "), (1, 2, "")],
)
def test_run_stops_when_no_rollback_is_left(
  data, tmp_path, max_rollbacks, checkpoint_every, skipped
):
  config = config_of(
    data,
    num_steps=40,
    max_rollbacks=max_rollbacks,
    checkpoint_every=checkpoint_every,
    **DIT,
  )
  with pytest.raises(SettingError, match=r"config.max_skipped") as error:
    loop.train(config, tmp_path)
  assert skipped in str(error.value)


def test_exception_after_a_rollback_before_the_start_is_preceded_by_a_save(
  data, tmp_path, monkeypatch
):
  config = config_of(data, checkpoint_every=2, max_rollbacks=1, max_skipped=9, **DIT)

  def fail_at(failing):
    def hook(step, state):
      if step == failing:
        raise ZeroDivisionError

    return hook

  with pytest.raises(ZeroDivisionError):
    loop.train(config, tmp_path, hooks=[fail_at(4)])
  answers = iter([True])
  monkeypatch.setattr(
    SkippedSteps, "too_many", property(lambda self: next(answers, False))
  )
  monkeypatch.setattr(SkippedSteps, "first", 3)
  with pytest.raises(ZeroDivisionError):  # the run starts at 4 and goes back to 2
    loop.train(config, tmp_path, hooks=[fail_at(3)])
  assert (tmp_path / "checkpoints" / "3").is_dir()
