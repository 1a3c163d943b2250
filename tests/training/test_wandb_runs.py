"""Weights & Biases: refusals, one run for a workdir, offline runs."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from mdt_jax.errors import SettingError
from mdt_jax.settings import Settings
from mdt_jax.training import loop
from mdt_jax.training.events import Bars
from mdt_jax.training.wandb_runs import WandbRun, check_wandb
from tests.training.tiny import tiny_dit_config


class FakeRun:
  """A run of the fake package; `step` is the step that it resumes from."""

  url, offline = "https://wandb.example/run", False

  def __init__(self, step, arguments):
    self.step, self.arguments = step, arguments
    self.logged, self.is_finished = [], False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
  """A module in the place of wandb."""
  fake = types.ModuleType("wandb")
  fake.runs, fake.resumes_at, fake.mode, fake.has_key = [], 0, "online", True

  def init(**arguments):
    fake.runs.append(FakeRun(fake.resumes_at, arguments))
    return fake.runs[-1]

  fake.init = init
  fake.Settings = dict
  fake.Image = lambda array: array.shape
  fake.Histogram = lambda np_histogram: [array.tolist() for array in np_histogram]
  fake.login = lambda prompt, verify: fake.has_key
  settings = types.SimpleNamespace(settings=fake)
  fake.setup = lambda: settings
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


@pytest.mark.parametrize("name", ["", "a/b", "a#b", "a" * 129])
def test_name_that_is_no_project_is_refused(name):
  with pytest.raises(SettingError, match=r"^config\.log\.wandb_project = .*must be"):
    Settings.from_config(tiny_dit_config(**{"log.wandb_project": name}))


def test_missing_package_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
  config = tiny_dit_config(**{"log.wandb_project": "digits"})
  with pytest.raises(SettingError, match=r"^config\.log\.wandb_project = 'digits': ne"):
    loop.train(config, tmp_path / "run")
  assert not list(tmp_path.rglob("*.*"))


def test_missing_key_is_refused_unless_offline(wandb):
  wandb.has_key = False
  with pytest.raises(SettingError, match="needs an API key"):
    check_wandb("digits")
  wandb.mode = "offline"
  check_wandb("digits")


def test_package_that_cannot_start_is_refused(wandb, monkeypatch):
  def setup():
    raise ValueError("mode must be\nonline")

  monkeypatch.setattr(wandb, "setup", setup)
  with pytest.raises(SettingError, match=r"wandb fails: mode must be online$"):
    check_wandb("digits")


def test_run_gets_project_name_and_settings(wandb, tmp_path):
  WandbRun(tmp_path, "digits", {"seed": 1})
  arguments = wandb.runs[0].arguments
  assert arguments["project"] == "digits"
  assert arguments["name"] == tmp_path.name
  assert arguments["config"] == {"seed": 1}


def test_resumed_run_has_the_id_of_the_workdir(wandb, tmp_path):
  for _ in range(2):
    WandbRun(tmp_path, "digits", {}).close()
  first, second = wandb.runs
  assert first.arguments["id"] == second.arguments["id"]
  assert second.arguments["resume"] == "allow"
  assert first.is_finished


def test_other_workdirs_have_other_ids(wandb, tmp_path):
  for name in "ab":
    (tmp_path / name).mkdir()
    WandbRun(tmp_path / name, "digits", {})
  first, second = wandb.runs
  assert first.arguments["id"] != second.arguments["id"]


def test_resumed_run_logs_nothing_before_its_last_step(wandb, tmp_path):
  wandb.resumes_at = 6
  run = WandbRun(tmp_path, "digits", {})
  for step in (4, 6, 8):
    run.write_scalars(step, {"loss": 1.0})
  assert [step for step, _ in wandb.runs[0].logged] == [6, 8]


def test_images_are_logged_by_name(wandb, tmp_path):
  run = WandbRun(tmp_path, "digits", {})
  run.write_images(4, {"samples": np.zeros((2, 4, 5, 3), np.uint8)})
  assert wandb.runs[0].logged == [(4, {"samples": [(4, 5, 3), (4, 5, 3)]})]


def test_bars_are_logged_as_histograms(wandb, tmp_path):
  run = WandbRun(tmp_path, "digits", {})
  bars = Bars(np.array([0, 0.5, 1]), np.array([2.0, np.nan]))
  run.write_bars(4, {"loss_by_time": bars})
  assert wandb.runs[0].logged == [(4, {"loss_by_time": [[2, 0], [0, 0.5, 1]]})]


def test_training_logs_metrics_and_pictures(wandb, tmp_path):
  changes = {"log.wandb_project": "digits", "sample_every": 4}
  changes["log.loss_by_time_every"] = 4
  loop.train(tiny_dit_config(**changes), tmp_path)
  (run,) = wandb.runs
  logged = {step: set() for step, _ in run.logged}
  for step, values in run.logged:
    logged[step] |= values.keys()
  assert "loss" in logged[2]
  pictures = {"samples", "strips", "loss_by_time_chart"}
  assert pictures | {"loss", "loss_by_time"} <= logged[4]
  assert run.is_finished


def test_run_that_cannot_be_opened_does_not_stop_training(
  wandb, tmp_path, monkeypatch, caplog
):
  def init(**arguments):
    raise OSError("no network")

  monkeypatch.setattr(wandb, "init", init)
  state = loop.train(tiny_dit_config(**{"log.wandb_project": "digits"}), tmp_path)
  assert int(state.step) == 4
  assert "NOT WRITTEN: Weights & Biases: no network" in caplog.text


def test_offline_run_is_written_to_the_workdir(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs the extra wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  config = tiny_dit_config(**{"log.wandb_project": "digits", "num_steps": 2})
  loop.train(config, tmp_path)
  config.num_steps = 4
  loop.train(config, tmp_path)
  written = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
  identity = (tmp_path / "wandb_id.txt").read_text().strip()
  assert len(written) == 2
  assert {path.name for path in written} == {f"run-{identity}.wandb"}
  for path in written:
    assert b"gradient_norm" in path.read_bytes()
