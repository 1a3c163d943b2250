"""Traces of the steps of config.profile, and of five steps after SIGUSR1."""

from __future__ import annotations

import logging
import os
import signal
import tempfile

import jax
import numpy as np
import pytest
from etils import epath

from mdt_jax.errors import SettingError
from mdt_jax.settings import Settings
from mdt_jax.training import loop
from mdt_jax.training.profiling import Profiler, profiling
from mdt_jax.training.writers import TENSORBOARD
from tests.cli import commands
from tests.training.tiny import tiny_dit_config


def sessions(workdir):
  return sorted(path.name for path in (workdir / TENSORBOARD).glob("plugins/profile/*"))


def events(workdir):
  """The events of the only trace: (name, number of the step or None)."""
  (path,) = (workdir / TENSORBOARD).glob("plugins/profile/*/*.xplane.pb")
  return [
    (event.name, dict(event.stats).get("step_num"))
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes
    for line in plane.lines
    for event in line.events
  ]


def steps_of(workdir):
  return [step for name, step in events(workdir) if name == "train_step"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("traced")
  config = tiny_dit_config(num_steps=8, profile="2:7", checkpoint_every=8)
  return workdir, loop.train(config, workdir)


def test_trace_holds_the_events_of_five_steps(traced):
  workdir, _ = traced
  assert steps_of(workdir) == [2, 3, 4, 5, 6]
  names = [name for name, _ in events(workdir)]
  assert names.count("wait_for_data") == 5
  assert any("fusion" in name for name in names)  # operations of the compiled step


def test_trace_lies_where_the_profile_plugin_looks(traced):
  workdir, _ = traced
  folder = workdir / "tensorboard" / "plugins" / "profile" / "step_0000002"
  assert {"xplane", "trace"} <= {
    path.name.split(".")[-2] for path in folder.iterdir()
  } | {path.name.split(".")[-3] for path in folder.iterdir()}


def test_trace_changes_no_number(traced, tmp_path):
  _, state = traced
  expected = loop.train(tiny_dit_config(num_steps=8, checkpoint_every=8), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_signal_traces_the_next_five_steps(tmp_path):
  def hook(step, state):
    if step == 2:
      os.kill(os.getpid(), signal.SIGUSR1)

  config = tiny_dit_config(num_steps=9, checkpoint_every=9)
  loop.train(config, tmp_path, hooks=[hook])
  assert steps_of(tmp_path) == [2, 3, 4, 5, 6]
  assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_run_that_ends_during_a_trace_writes_the_trace(tmp_path):
  def hook(step, state):
    if step == 3:
      os.kill(os.getpid(), signal.SIGUSR1)

  loop.train(tiny_dit_config(), tmp_path, hooks=[hook])
  assert steps_of(tmp_path) == [3]


def test_resumed_run_traces_the_steps_that_are_left(tmp_path):
  config = tiny_dit_config(num_steps=2)
  loop.train(config, tmp_path)
  config.num_steps, config.profile = 4, "1:4"
  loop.train(config, tmp_path)
  assert steps_of(tmp_path) == [2, 3]


def test_profiler_that_fails_does_not_stop_training(tmp_path, monkeypatch, caplog):
  def fail(*arguments, **options):
    raise RuntimeError("Only one profile may be run\nat a time.")

  monkeypatch.setattr(jax.profiler, "start_trace", fail)
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    state = loop.train(tiny_dit_config(profile="2:3"), tmp_path)
  assert int(state.step) == 4
  assert "NOT WRITTEN: a trace: Only one profile may be run at a time." in caplog.text


def test_trace_that_cannot_start_is_tried_once(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  folders = []

  def fail(folder, **options):
    folders.append(folder)
    raise RuntimeError("no profiler")

  monkeypatch.setattr(jax.profiler, "start_trace", fail)
  profiler = Profiler(epath.Path("gs://bucket/run"), range(2, 6))
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    profiler.start(2, {})
  assert not any(profiler.starts(step) or profiler.stops(step) for step in range(3, 7))
  (folder,) = folders
  assert folder.parent == tmp_path and not list(tmp_path.iterdir())
  assert caplog.messages == ["NOT WRITTEN: a trace: no profiler"]
  profiler.request()
  assert profiler.starts(3)  # SIGUSR1 asks for another try


def test_trace_beyond_the_run_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(SettingError, match=r"^config\.profile = '2:5': must be FIRST:LA"):
    loop.train(tiny_dit_config(profile="2:5"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("processes", "index", "traces"),
  [("first", 0, True), ("first", 1, False), ("all", 1, True)],
)
def test_processes_that_trace(tmp_path, monkeypatch, processes, index, traces):
  monkeypatch.setattr(jax, "process_index", lambda: index)
  config = tiny_dit_config(profile="1:2", profile_processes=processes)
  with profiling(Settings.from_config(config), tmp_path) as profiler:
    assert profiler.starts(1) == traces


def test_processes_of_a_host_write_traces_of_their_own(tmp_path, monkeypatch):
  for index in (0, 1):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    profiler = Profiler(tmp_path / TENSORBOARD, range(2, 3))
    profiler.start(2, {})
    profiler.stop({})
  assert sessions(tmp_path) == ["step_0000002", "step_0000002_process_1"]


def test_handler_of_the_process_keeps_the_signal(tmp_path):
  received = []
  before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
  try:
    with profiling(Settings(), tmp_path) as profiler:
      os.kill(os.getpid(), signal.SIGUSR1)
      assert not profiler.starts(0)
    assert received == [1]
  finally:
    signal.signal(signal.SIGUSR1, before)


def test_request_during_a_trace_waits_for_its_end(tmp_path, monkeypatch):
  monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
  profiler = Profiler(tmp_path, range(2, 4))
  profiler.start(2, {})
  profiler.request()
  assert not profiler.starts(3)
  assert profiler.stops(4)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
  profiler.stop({})
  assert profiler.starts(4)


def test_bad_setting_ends_the_command_with_code_2(tmp_path):
  flags = ("--config=digits", f"--workdir={tmp_path}/run", "--config.profile=5:3")
  result = commands.run("mdt_jax.main", *flags)
  commands.assert_refused(result, "config.profile = '5:3'", "FIRST:LAST")
  assert not (tmp_path / "run").exists()
