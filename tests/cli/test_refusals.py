"""Flags of the six commands: help, missing flags, config files, run folders."""

from __future__ import annotations

import os
import shlex

import numpy as np
import pytest

from mdt_jax.checkpoints.loading import save_model
from mdt_jax.data import examples
from mdt_jax.experiment import Experiment
from mdt_jax.settings import Settings
from tests import forked, reference
from tests.cli import commands
from tests.cli.commands import assert_refused
from tests.training.tiny import tiny_config

TRAIN = ("main", "--config=digits", "--workdir=run")
OWN = """
from mdt_jax.config import default_config

def get_config():
  config = default_config()
  {}
  return config
"""


def run(command, *flags, **options):
  return commands.run(f"mdt_jax.{command}", *flags, **options)


def import_at_once(*flags):
  """Runs mdt_jax.encode, which waits for no disk."""
  examples.PAUSES = ()
  forked.run_module("mdt_jax.encode", *flags)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
def test_disk_that_cannot_be_read_ends_in_one_line_and_75(tmp_path):
  folder = tmp_path / "features"
  folder.mkdir()
  np.save(folder / "0.npy", np.zeros((4, 8, 8), np.float32))
  (folder / "1.npy").symlink_to("/proc/self/mem")  # reading fails with EIO
  process = forked.Forked(
    import_at_once, f"--features={folder}", f"--output={tmp_path / 'set'}"
  )
  assert process.end() == 75, process.err
  (line,) = [text for text in process.err.splitlines() if "error: " in text]
  assert "1.npy" in line and "repeat the command" in line


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
    ("main", "--config=none.py", ["--config = 'none.py'", "no such file"]),
    ("main", "--undefok=foo --fooo=3", ["unknown flag --fooo"]),
    ("sample", "--num_step=3", ["--num_step", "--num_steps=3?"]),
    ("sample", "--cfg_scale=two", ["--cfg_scale = 'two'", "a number"]),
    ("sample", "--steps=3 --num_steps=3", ["--steps", "--num_steps"]),
    ("evaluate", "--cfg_scale=2", ["--cfg_scale", "--sampling=cfg_scale=2?"]),
    ("evaluate", "--guidance=2", ["--guidance", "--sampling=cfg_scale=2?"]),
    ("evaluate", "--num-steps=3", ["--num-steps", "did you mean --num_steps=3?"]),
    ("evaluate", "--ema-decay=0.5", ["--ema-decay", "did you mean --ema_decay=0.5?"]),
    ("evaluate", "--config.sampling.ema_decay=0.5", ["did you mean --ema_decay=0.5?"]),
    ("evaluate", "--seed=-1", ["--seed = -1", "must"]),
    ("sample", "--checkpoint=run --labels=random --seed=-1", ["--seed = -1", "must"]),
    ("sample", "--checkpoint=run --weak_checkpoint=hf://a/b", ["--checkpoint = 'run'"]),
    ("plan", "--config=digits --topology=cpu:1 --what=x", ["--what = 'x'", "sample"]),
  ],
)
def test_invalid_flag_gives_one_line_and_exit_code_2(command, flag, texts, tmp_path):
  given = ["--config=digits", "--workdir=run"] if command == "main" else []
  given = ["--checkpoint=run"] if command == "sample" else given
  assert_refused(run(command, *given, *flag.split(), folder=tmp_path), *texts)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  "flags",
  [
    ["--config.num_steps=0"],
    ["-config.num_steps=0"],
    ["--config.num_steps=0", "--"],
    ["--undefok=foo,bar", "--config.num_steps=0", "--foo=3", "--nobar"],
    ["--config.num_steps=0", "--foo", "--undefok", "foo"],
    ["--flagfile=flags.txt"],
  ],
)
def test_forms_of_flags_that_absl_reads_are_accepted(tmp_path, flags):
  (tmp_path / "flags.txt").write_text("--config.num_steps=0\n")
  assert_refused(run(*TRAIN, *flags, folder=tmp_path), "config.num_steps = 0")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--helpfull", "--helpxml"])
def test_help_of_absl_needs_no_other_flag(flag):
  code, out, err = run("main", flag)
  assert (code, err) == (0, "")
  assert "verbosity" in out


@pytest.mark.parametrize("command", ["main", "sample"])
def test_missing_flagfile_is_refused(command):
  assert_refused(run(command, "--flagfile=nowhere"), "nowhere")


def test_second_config_is_refused():
  flags = ("--config=digits", "--config.seed=1", "--config=mdt_b2", "--workdir=run")
  assert_refused(run("main", *flags), "--config=mdt_b2", "given before")


def test_setting_before_its_config_is_refused():
  result = run("main", "--config.seed=1", "--config=digits", "--workdir=run")
  assert_refused(result, "--config.seed=1", "before a value for --config")


@pytest.mark.parametrize(
  ("line", "texts"),
  [
    ("config.batchsize = 3", ["batchsize"]),
    ("raise ValueError('two\\nlines')", [":6: ValueError: two lines"]),
    ("config.num_steps = 'many'", [":6: TypeError"]),
    (
      "from mdt_jax.errors import SettingError; raise SettingError('x', 1, 'bad')",
      [":6: SettingError: x = 1: bad"],
    ),
  ],
)
def test_error_in_a_config_file_names_its_line(tmp_path, line, texts):
  (tmp_path / "own.py").write_text(OWN.format(line))
  result = run("main", "--config=own.py", "--workdir=run", folder=tmp_path)
  assert_refused(result, "--config: own.py", *texts)


def test_config_file_that_is_no_text_is_named(tmp_path):
  (tmp_path / "own.py").write_bytes(b"\0")
  result = run("main", "--config=own.py", "--workdir=run", folder=tmp_path)
  assert_refused(result, "--config: own.py: SyntaxError")


@pytest.mark.parametrize("flag", ["", "=true", "=false", " true"])
@pytest.mark.parametrize("after", [(), ("--config.seed=1",)])
def test_own_boolean_argument_needs_no_value(tmp_path, flag, after):
  line = "config.num_steps = 0; config.optimizer.arguments.nesterov = False"
  (tmp_path / "own.py").write_text(OWN.format(line))
  flags = [*f"--config.optimizer.arguments.nesterov{flag}".split(), *after]
  given = ["--config=own.py", "--workdir=run", *flags]
  assert_refused(run("main", *given, folder=tmp_path), "config.num_steps = 0")


@pytest.mark.parametrize(
  ("flag", "meant"),
  [
    ("kind=fast", """'{"kind": "fast"}'"""),
    ("nesterov=true", """'{"nesterov": True}'"""),
    ("nesterov", """'{"nesterov": True}'"""),
    ("scale=2.0", """'{"scale": 2.0}'"""),
  ],
)
def test_error_for_a_missing_own_argument_suggests_a_dict(tmp_path, flag, meant):
  result = run(*TRAIN, f"--config.optimizer.arguments.{flag}", folder=tmp_path)
  meant = f"--config.optimizer.arguments={meant}"
  assert_refused(result, meant)
  given = [shlex.split(meant)[0], "--config.num_steps=0"]
  assert_refused(run(*TRAIN, *given, folder=tmp_path), "config.num_steps = 0")


def test_tilde_in_the_output_of_convert_is_the_home_folder(tmp_path):
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "file").touch()
  source = tmp_path / "fid.pth"
  source.touch()
  flags = ["--inception", f"--input={source}", "--output=~/taken"]
  result = run("convert", *flags, environment={"HOME": str(tmp_path)})
  assert_refused(result, f"--output = '{tmp_path}/taken'")


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
