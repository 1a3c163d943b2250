"""Checkpoints: saving, restoring, damage, failed saves, errors."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import jax
import numpy as np
import optax
import pytest
from etils import epath

from mdt_jax.buckets import list_objects
from mdt_jax.checkpoints import checksums, incomplete, manager, retries
from mdt_jax.checkpoints.loading import load_ema
from mdt_jax.checkpoints.manager import Checkpoints, NothingSavedError
from mdt_jax.checkpoints.retries import SaveError
from mdt_jax.errors import SettingError
from mdt_jax.experiment import build
from mdt_jax.settings import Settings
from mdt_jax.train_state import init_state
from mdt_jax.training.program import make_program
from tests.training.tiny import tiny_dit_config


def make_state(config):
  experiment = build(config)
  state = init_state(
    jax.random.key(1),
    experiment.model,
    experiment.optimizer,
    config.ema_decays,
    experiment.objective.timestep_sampler,
  )
  ema = {d: jax.tree.map(lambda x, d=d: x + float(d), p) for d, p in state.ema.items()}
  return state.replace(step=state.step + 7, ema=ema)


def save(folder, config, steps=(7,), to_keep=2):
  state = make_state(config)
  checkpoints = Checkpoints(folder, to_keep)
  for number in steps:
    checkpoints.save(number, state, config.to_dict())
  checkpoints.close()
  return state


def assert_same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = tiny_dit_config(
    ema_decays=(0.5, 0.9), timestep_sampler="loss-second-moment", seed=3
  )
  return folder, config, save(folder, config)


def test_checkpoint_of_another_own_optimizer_is_refused(saved):
  folder, config, _ = saved
  other = build(config, optimizer=optax.lion(1e-3))
  like = make_program(other).state
  checkpoints = Checkpoints(folder, 2)
  with pytest.raises(SettingError) as error:
    checkpoints.restore(like, other)
  checkpoints.close()
  assert error.value.setting == "optimizer"
  assert "step 7" in error.value.accepted


def test_restored_state_is_bit_exact_and_logs_no_warning(saved, caplog):
  folder, config, state = saved
  checkpoints = Checkpoints(folder, 2)
  restored = checkpoints.restore(jax.eval_shape(lambda: state), build(config))
  checkpoints.close()
  assert_same(state, restored)
  assert [r.message for r in caplog.records if r.levelname == "WARNING"] == []


def test_ema_decay_zero_loads_the_parameters_themselves(tmp_path):
  """A decay of 0.0 is not treated as a missing decay."""
  config = tiny_dit_config(ema_decays=(0.9, 0.0))
  state = save(tmp_path, config)
  assert_same(load_ema(tmp_path, ema_decay=0.0).params, state.ema["0.0"])


@pytest.mark.parametrize("kernel", ["cudnn", "pallas"])
def test_run_with_a_fused_kernel_is_loaded_on_a_cpu(tmp_path, kernel, caplog):
  config = tiny_dit_config()
  state = make_state(config)
  config.model.attention_kernel = kernel
  checkpoints = Checkpoints(tmp_path, 2)
  checkpoints.save(7, state, config.to_dict())
  checkpoints.close()
  with caplog.at_level("INFO", logger="mdt_jax"):
    assert load_ema(tmp_path).experiment.model.attention_kernel == "plain"
  assert f"attention by plain products: {kernel} needs" in caplog.text


@pytest.mark.parametrize(("decay", "expected"), [(None, "0.5"), (0.9, "0.9")])
def test_load_ema_loads_the_requested_average(saved, decay, expected):
  folder, _, state = saved
  checkpoint = load_ema(folder, ema_decay=decay)
  assert checkpoint.step == 7
  assert checkpoint.experiment.settings.sampled_decay == float(expected)
  assert_same(checkpoint.params, state.ema[expected])


def test_config_is_restored_with_the_checkpoint(saved):
  folder, config, _ = saved
  expected = config.copy_and_resolve_references()
  expected.sampling.ema_decay = 0.5  # The decay of the loaded parameters.
  assert load_ema(folder).experiment.settings.to_dict() == expected.to_dict()


def test_setting_missing_from_an_old_config_gets_its_default():
  old = tiny_dit_config().to_dict()
  del old["sampling"]["eta"], old["log_every"]
  settings = Settings.from_dict(old)
  assert (settings.sampling.eta, settings.log_every) == (0.0, 100)


def test_only_the_latest_checkpoints_are_kept(tmp_path):
  save(tmp_path, tiny_dit_config(), steps=(1, 2, 3), to_keep=2)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [2, 3]


@pytest.mark.parametrize(
  ("setting", "value"),
  [
    ("model.depth", 6),
    ("model.name", "MDT-S/2"),
    ("optimizer.name", "adamw"),
    ("optimizer.clip_norm", 0.0),
    ("ema_decays", (0.9,)),
  ],
)
def test_error_names_the_setting_that_prevents_resuming(saved, setting, value):
  folder, config, state = saved
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict({setting: value})
  checkpoints = Checkpoints(folder, 2)
  with pytest.raises(SettingError) as error:
    checkpoints.restore(jax.eval_shape(lambda: state), build(other))
  checkpoints.close()
  assert str(folder) in str(error.value)
  name = "variant" if setting == "model.name" else setting.split(".")[-1]
  assert name in str(error.value)


def test_new_average_starts_from_the_parameters_of_the_checkpoint(saved, caplog):
  folder, config, state = saved
  other = config.copy_and_resolve_references()
  other.ema_decays = (0.99, 0.9, 0.5)
  experiment = build(other)
  checkpoints = Checkpoints(folder, 2)
  with caplog.at_level(logging.INFO, "mdt_jax"):
    restored = checkpoints.restore(make_program(experiment).state, experiment)
  checkpoints.close()
  assert "the average with decay 0.99 starts at step 7" in caplog.messages
  assert_same(restored.params, state.params)
  assert_same(restored.ema["0.99"], state.params)
  assert_same(restored.replace(ema={}), state.replace(ema={}))
  for decay in ("0.5", "0.9"):
    assert_same(restored.ema[decay], state.ema[decay])


def test_other_settings_of_a_resumed_run_are_logged(saved, caplog):
  folder, config, state = saved
  other = config.copy_and_resolve_references()
  other.optimizer.learning_rate, other.batch_size = 0.5, 16
  checkpoints = Checkpoints(folder, 2)
  with caplog.at_level(logging.INFO, "mdt_jax"):
    restored = checkpoints.restore(jax.eval_shape(lambda: state), build(other))
  checkpoints.close()
  assert_same(state, restored)
  (line,) = (line for line in caplog.messages if "config.batch_size" in line)
  assert "config.batch_size was 8, now 16" in line
  assert "config.optimizer.learning_rate was 0.001, now 0.5" in line


def test_folder_without_checkpoints_is_refused_and_stays_empty(tmp_path):
  with pytest.raises(SettingError, match=r"^path = "):
    load_ema(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_folder_without_a_finished_checkpoint_is_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(SettingError, match=r"^path = .*checkpoint"):
    load_ema(tmp_path)


@pytest.mark.parametrize(("argument", "value"), [("step", 8), ("ema_decay", 0.7)])
def test_error_for_a_missing_step_or_decay_lists_the_saved_ones(saved, argument, value):
  with pytest.raises(SettingError, match=rf"^{argument} = {value}: accepted are"):
    load_ema(saved[0], **{argument: value})


# Damage and failures.


def test_only_the_saving_run_removes_unfinished_checkpoints(tmp_path):
  config = tiny_dit_config()
  state = save(tmp_path, config)
  half = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
  (half / "state").mkdir(parents=True)
  load_ema(tmp_path)
  restore(tmp_path, state, config)
  assert half.is_dir()
  checkpoints = Checkpoints(tmp_path, 2, cleans=True)
  checkpoints.save(10, state, config.to_dict())
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "7"]


def test_checkpoint_that_was_copied_to_a_bucket_is_kept(bucket):
  config = tiny_dit_config()
  state = save(bucket, config)
  folder = epath.Path(bucket) / "checkpoints"
  for name in list_objects(folder):
    if name.endswith(incomplete.COMMIT_SUCCESS):  # earlier versions of Orbax write none
      (folder / name).unlink()
  checksums.write_checksums(folder / "7")
  (folder / "9" / "state").write_bytes(b"half of a save")
  Checkpoints(bucket, 2, cleans=True).close()
  assert [path.name for path in folder.iterdir()] == ["7"]
  assert_same(restore(bucket, state, config), state)


def restore(folder, state, config):
  checkpoints = Checkpoints(folder, 2)
  try:
    return checkpoints.restore(jax.eval_shape(lambda: state), build(config))
  finally:
    checkpoints.close()


def test_damaged_checkpoint_is_moved_and_the_previous_one_loaded(tmp_path, caplog):
  config = tiny_dit_config()
  state = save(tmp_path, config, steps=(7, 8))
  largest = max(
    (path for path in (tmp_path / "checkpoints" / "8").rglob("*") if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))
  assert_same(restore(tmp_path, state, config), state)
  assert not (tmp_path / "checkpoints" / "8").exists()
  (aside,) = (tmp_path / "damaged").iterdir()
  assert aside.name.startswith("8_")


def test_damaged_checkpoint_in_a_bucket_is_moved(bucket):
  config = tiny_dit_config()
  state = save(bucket, config, steps=(7, 8))
  folder = epath.Path(bucket)
  (folder / "checkpoints" / "8" / "checksums.json").unlink()  # killed before it
  before = {name for name in list_objects(folder) if "/8/" in name}
  assert_same(restore(bucket, state, config), state)
  assert not (folder / "checkpoints" / "8").exists()
  (aside,) = (folder / "damaged").iterdir()
  assert len(list_objects(aside)) == len(before) > 5


def note_rollback(folder, step, offset):
  checkpoints = Checkpoints(folder, 3)
  checkpoints.note_rollback(step, offset)
  checkpoints.close()


def test_restored_state_has_the_batches_of_the_last_rollback(tmp_path):
  config = tiny_dit_config()
  state = save(tmp_path, config, steps=(5, 6))
  for offset in (3, 4):
    note_rollback(tmp_path, 6, offset)
  restored = restore(tmp_path, state, config)
  assert int(restored.batch_offset) == 4
  assert_same(restored.replace(batch_offset=state.batch_offset), state)
  checkpoints = Checkpoints(tmp_path, 3)
  like = jax.eval_shape(lambda: state)
  earlier = checkpoints.restore(like, build(config), until=5)
  checkpoints.close()
  assert int(earlier.batch_offset) == 0


@pytest.mark.parametrize("content", ["", "[]", '{"step": 6, "batch_offset": 4}'])
def test_checkpoint_with_a_damaged_rollback_is_moved(tmp_path, content):
  config = tiny_dit_config()
  state = save(tmp_path, config, steps=(5, 6))
  (tmp_path / "checkpoints/6/rollback.json").write_text(content)
  assert int(restore(tmp_path, state, config).batch_offset) == 0
  (moved,) = (tmp_path / "damaged").iterdir()
  assert moved.name.startswith("6_")


def test_rollback_of_a_run_in_a_bucket(bucket):
  config = tiny_dit_config()
  state = save(bucket, config)
  note_rollback(bucket, 7, 4)
  assert int(restore(bucket, state, config).batch_offset) == 4


def test_restore_fails_when_every_checkpoint_is_damaged(tmp_path):
  config = tiny_dit_config()
  state = save(tmp_path, config, steps=(7, 8))
  for step in ("7", "8"):
    (tmp_path / "checkpoints" / step / "checksums.json").unlink()
  with pytest.raises(SettingError, match="every checkpoint is damaged"):
    restore(tmp_path, state, config)
  assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_unfinished_first_save_is_told_from_damage(tmp_path):
  config = tiny_dit_config()
  state = save(tmp_path, config)
  (tmp_path / "checkpoints" / "7" / "checksums.json").unlink()
  with pytest.raises(NothingSavedError):
    restore(tmp_path, state, config)
  assert len(list((tmp_path / "damaged").iterdir())) == 1


def failing(monkeypatch, count):
  """Makes the first `count` saves fail with the error of a full disk."""
  left = [count]
  original = checksums.write_checksums

  def write(folder):
    if left[0]:
      left[0] -= 1
      raise OSError(28, "No space left on device")
    original(folder)

  monkeypatch.setattr(checksums, "write_checksums", write)
  monkeypatch.setattr(retries, "FIRST_PAUSE", 0)


def wait_until_it_must_be_retried(checkpoints):
  end = time.monotonic() + 60
  while not checkpoints.must_retry():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_failed_save_is_retried_after_a_pause(tmp_path, monkeypatch):
  failing(monkeypatch, 1)
  monkeypatch.setattr(retries, "FIRST_PAUSE", 1)
  config = tiny_dit_config()
  state = make_state(config)
  checkpoints = Checkpoints(tmp_path, 2, max_failures=3)
  assert checkpoints.save(1, state, config.to_dict())
  wait_until_it_must_be_retried(checkpoints)  # The first save has failed.
  start = time.monotonic()
  assert not checkpoints.save(2, state, config.to_dict(), again=True)
  # A scheduled save waits for the pause too.
  assert not checkpoints.save(3, state, config.to_dict())
  wait_until_it_must_be_retried(checkpoints)
  assert time.monotonic() - start > 0.9
  assert checkpoints.save(4, state, config.to_dict(), again=True)
  checkpoints.close()
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
  assert checksums.damage(tmp_path / "checkpoints" / "4") is None


def test_saves_fail_while_the_disk_is_away_and_succeed_afterwards(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(retries, "FIRST_PAUSE", 0)
  disk, away = tmp_path / "disk", tmp_path / "away"
  disk.mkdir()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").symlink_to(disk)
  config = tiny_dit_config()
  state = make_state(config)
  with contextlib.closing(
    Checkpoints(tmp_path / "run", 2, max_failures=4)
  ) as checkpoints:
    checkpoints.finish(1, state, config.to_dict())
    disk.rename(away)
    for step in (2, 3):  # the second save cannot even open the folder
      assert checkpoints.save(step, state, config.to_dict(), again=True)
      wait_until_it_must_be_retried(checkpoints)
      assert not checkpoints.save(step, state, config.to_dict())
    away.rename(disk)
    assert checkpoints.save(4, state, config.to_dict(), again=True)
  assert sorted(path.name for path in disk.iterdir()) == ["1", "4"]
  assert checksums.damage(disk / "4") is None


def test_training_waits_once_for_a_save_that_hangs(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(manager, "PATIENCE", 0.5)
  write, goes_on = checksums.write_checksums, threading.Event()
  monkeypatch.setattr(
    checksums, "write_checksums", lambda folder: goes_on.wait(60) and write(folder)
  )
  config = tiny_dit_config()
  state = make_state(config)
  with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
    assert checkpoints.save(1, state, config.to_dict())
    start = time.monotonic()
    assert not checkpoints.save(2, state, config.to_dict())
    first = time.monotonic() - start
    for step in range(3, 13):
      assert not checkpoints.save(step, state, config.to_dict())
    assert first >= 0.5 and time.monotonic() - start < 2
    assert caplog.text.count("IS NOT SAVED") == 1
    goes_on.set()
    monkeypatch.setattr(manager, "PATIENCE", 60)
    checkpoints.finish(13, state, config.to_dict())
  assert checksums.damage(tmp_path / "checkpoints" / "13") is None


def test_last_save_is_retried_until_it_succeeds(tmp_path, monkeypatch):
  failing(monkeypatch, 2)
  config = tiny_dit_config()
  checkpoints = Checkpoints(tmp_path, 2, max_failures=3)
  checkpoints.finish(1, make_state(config), config.to_dict())
  checkpoints.close()
  assert checksums.damage(tmp_path / "checkpoints" / "1") is None


def test_max_failures_failed_saves_raise_save_error(tmp_path, monkeypatch):
  failing(monkeypatch, 9)
  config = tiny_dit_config()
  state = make_state(config)
  checkpoints = Checkpoints(tmp_path, 2, max_failures=2)
  with pytest.raises(SaveError, match=r"2 saves in a row failed.*No space left"):
    checkpoints.finish(1, state, config.to_dict())
  checkpoints.close()


def test_keep_every_keeps_multiples_besides_the_latest(tmp_path):
  config = tiny_dit_config()
  state = make_state(config)
  checkpoints = Checkpoints(tmp_path, 1, keep_every=4)
  for step in (3, 4, 5, 6):
    checkpoints.save(step, state, config.to_dict())
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
