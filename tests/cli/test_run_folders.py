"""A path inside a run's folder is refused. The error suggests the run's folder."""

from __future__ import annotations

import shutil

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


def test_folder_name_matches_the_checkpoint_manager():
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
def test_error_suggests_the_run_and_the_step(run, path, hint):
  with pytest.raises(SettingError) as error:
    check_run_folder("checkpoint", path, "step")
  assert (error.value.setting, error.value.value) == ("--checkpoint", path)
  assert hint in error.value.accepted


def test_error_of_a_command_without_step_suggests_only_the_run(run):
  with pytest.raises(SettingError, match=r"did you mean --workdir=run\?"):
    check_run_folder("workdir", "run/checkpoints/1500")


def test_error_for_an_absolute_path_suggests_an_absolute_path(run):
  with pytest.raises(SettingError) as error:
    check_run_folder("workdir", str(run / "checkpoints" / "1500"))
  assert f"--workdir={run}?" in error.value.accepted


@pytest.mark.parametrize(
  "path",
  [
    *("run", "new", "run/samples", "run/checkpoints/1500/model.pt"),
    *("checkpoints/1", "checkpoints/digits", "checkpoints/2"),
  ],
)
def test_run_folders_new_folders_and_files_are_accepted(run, path):
  (run / "checkpoints" / "1500" / "model.pt").touch()
  shutil.copytree(run, run.parent / "checkpoints" / "1")
  check_run_folder("workdir", path)


def test_accepts_parent_allows_the_checkpoints_folder(run):
  check_run_folder("checkpoint", "run/checkpoints", "step", accepts_parent=True)


def test_is_run_looks_for_a_checkpoints_folder(run):
  assert is_run(run)
  assert not is_run(run / "checkpoints")
  assert not is_run("new")
