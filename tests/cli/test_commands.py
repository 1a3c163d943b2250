"""Flags of the six commands: help, missing flags, packaged configs, run folders."""

from __future__ import annotations

import pytest

from mdt_jax.checkpoints.loading import save_model
from mdt_jax.experiment import Experiment
from mdt_jax.settings import Settings
from tests import forked, reference
from tests.training.tiny import tiny_config


def run(command, *flags, **options):
  process = forked.command(f"mdt_jax.{command}", *flags, **options)
  return process.end(), process.out, process.err


def assert_refused(result, *texts):
  code, _, err = result
  assert code == 2, err
  (line,) = err.splitlines()
  assert line.startswith("error: ")
  for text in texts:
    assert text in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  experiment = Experiment(Settings.from_config(tiny_config()))
  params = reference.random_params(experiment.model)
  save_model(workdir, experiment.settings, params, step=2)
  return workdir


@pytest.mark.parametrize(
  ("command", "flag"),
  [
    ("main", "--replay_step=INTEGER"),
    ("sample", "--num_steps=INTEGER  (or --steps)"),
    ("evaluate", "--metrics=A,B,..."),
    ("encode", "--batch_size=INTEGER"),
    ("convert", "--decode_depth=INTEGER"),
    ("plan", "--config=TEXT"),
  ],
)
def test_help_describes_only_the_flags_of_the_command(command, flag):
  code, out, _ = run(command, "--help")
  assert code == 0
  assert flag in out
  assert "verbosity" not in out
  _, _, flags = out.partition("\nFlags:")
  own = flags.partition("Flags for several processes:")[0].split("\n  --")[1:]
  assert own
  for text in own:
    assert any(word in text for word in ("Default:", "Required.", "Needed")), text


@pytest.mark.parametrize(
  ("command", "flags", "texts"),
  [
    ("main", ["--workdir=x"], ["--config must be given", "--config=digits"]),
    ("main", ["configs/digits.py"], ["--config=configs/digits.py"]),
    ("sample", [], ["--checkpoint must be given", "--checkpoint=runs/digits"]),
    ("encode", ["--source=x"], ["--output must be given", "Folder of the set"]),
    ("plan", ["--config=digits"], ["--topology must be given", "v5e:16x16"]),
  ],
)
def test_missing_flag_is_refused(command, flags, texts):
  assert_refused(run(command, *flags), *texts)


@pytest.mark.parametrize(
  ("command", "flag", "texts"),
  [
    ("main", "--batch_size=64", ["--batch_size", "--config.batch_size=64?"]),
    ("main", "--config.optimizer=lion", ["'lion'", "--config.optimizer.name=lion?"]),
    ("sample", "--num_step=3", ["--num_step", "--num_steps=3?"]),
    ("sample", "--cfg_scale=two", ["--cfg_scale = 'two'", "a number"]),
    ("sample", "--steps=3 --num_steps=3", ["--steps", "--num_steps"]),
    ("evaluate", "--cfg_scale=2", ["--cfg_scale", "--sampling=cfg_scale=2?"]),
  ],
)
def test_invalid_flag_gives_one_line_and_exit_code_2(command, flag, texts, tmp_path):
  given = ["--config=digits", "--workdir=run"] if command == "main" else []
  given = ["--checkpoint=run"] if command == "sample" else given
  assert_refused(run(command, *given, *flag.split(), folder=tmp_path), *texts)
  assert not any(tmp_path.iterdir())


def test_packaged_config_is_found_from_any_folder(tmp_path):
  flags = ["--config=digits", "--workdir=run", "--config.num_steps=0"]
  assert_refused(run("main", *flags, folder=tmp_path), "config.num_steps = 0")
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "evaluate", "convert"])
def test_error_for_a_checkpoint_folder_suggests_run_and_step(
  trained, tmp_path, command
):
  name = "input" if command == "convert" else "checkpoint"
  flags = ["--to_torch", f"--output={tmp_path / 'x.pt'}"] if name == "input" else []
  result = run(command, f"--{name}={trained}/checkpoints/2", *flags)
  assert_refused(result, f"--{name}={trained} --step=2?")


def test_training_into_a_checkpoints_folder_is_refused(trained):
  before = sorted(trained.rglob("*"))
  result = run("main", "--config=digits", f"--workdir={trained}/checkpoints")
  assert_refused(result, f"--workdir={trained}?")
  assert sorted(trained.rglob("*")) == before


def test_converting_a_run_needs_to_torch(trained, tmp_path):
  result = run("convert", f"--input={trained}", f"--output={tmp_path / 'out'}")
  assert_refused(result, f"--input = {str(trained)!r}", "--to_torch")
  assert not (tmp_path / "out").exists()
