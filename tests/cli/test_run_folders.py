"""A path inside a run's folder is refused, and the run's folder suggested."""

from __future__ import annotations

import pytest

from mdt_jax.checkpoints import manager
from mdt_jax.cli import run_folders
from mdt_jax.cli.run_folders import check_run_folder, is_run
from mdt_jax.errors import SettingError


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run" / "checkpoints" / "1500" / "ema").mkdir(parents=True)
  return tmp_path / "run"


def test_the_folder_s_name_is_that_of_the_checkpoints():
  assert run_folders._FOLDER == manager.FOLDER


@pytest.mark.parametrize(
  ("path", "hint"),
  [
    ("run/checkpoints/1500", "--checkpoint=run --step=1500?"),
    ("run/checkpoints/1500/", "--checkpoint=run --step=1500?"),
    ("run/checkpoints/1500/ema", "--checkpoint=run --step=1500?"),
    ("run/checkpoints/2000", "--checkpoint=run --step=2000?"),
    ("run/checkpoints", "--checkpoint=run?"),
  ],
)
def test_the_run_and_the_step_are_suggested(run, path, hint):
  with pytest.raises(SettingError) as error:
    check_run_folder("checkpoint", path, "step")
  assert (error.value.setting, error.value.value) == ("--checkpoint", path)
  assert hint in error.value.accepted


def test_a_command_without_a_step_gets_the_folder_alone(run):
  with pytest.raises(SettingError, match=r"did you mean --workdir=run\?"):
    check_run_folder("workdir", "run/checkpoints/1500")


def test_absolute_paths_are_suggested_for_absolute_paths(run):
  with pytest.raises(SettingError) as error:
    check_run_folder("workdir", str(run / "checkpoints" / "1500"))
  assert f"--workdir={run}?" in error.value.accepted


@pytest.mark.parametrize("path", ["run", "new", "run/samples", "other/checkpoints/new"])
def test_folders_of_runs_and_new_folders_are_accepted(run, path):
  check_run_folder("workdir", path)


def test_the_folder_of_checkpoints_is_accepted_where_a_command_takes_it(run):
  check_run_folder("checkpoint", "run/checkpoints", "step", accepts_parent=True)


def test_a_run_is_known_by_its_checkpoints(run):
  assert is_run(run)
  assert not is_run(run / "checkpoints")
  assert not is_run("new")
