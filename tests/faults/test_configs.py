"""Invalid configs give one line and exit code 2 before compiling or writing."""

from __future__ import annotations

import random

import pytest

from tests.faults import run_config, runs

# The config of the tests does not use these settings. A name in data.vae would be
# looked up on the hub.
UNUSED = {
  *("data.path", "data.split", "data.vae"),
  *("eval.metrics", "eval.reference", "eval.inception"),
}
FILES = {
  "empty": "",
  "cut off": "from mdt_jax.config import default_config\ndef get_conf",
  "no Python": "batch_size: 8\nmodel:\n  name: DiT-S/2\n",
  "bytes": "\x00\x01\x02",
  "nothing returned": "def get_config():\n  pass\n",
  "a dict": "def get_config():\n  return {'batch_size': 8}\n",
  "an error": "def get_config():\n  return 1 / 0\n",
  "an error of several lines": "raise ValueError('one\\ntwo')\n",
  "an import that is not there": "import no_such_module\n",
  "an exit": "raise SystemExit(0)\n",
}


def fields(config, prefix=""):
  """(dotted name, value) of each setting."""
  for name, value in config.items():
    if hasattr(value, "items"):
      yield from fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def damages():
  """Yields (description, name in the error, lines that change `config`, flags)."""
  for name, value in fields(run_config.get_config()):
    last = name.split(".")[-1]
    parent, _, _ = f"config.{name}".rpartition(".")
    wrong = [["x"], object, {"a": 1}]
    if not isinstance(value, str) and value is not None:
      wrong.append("many")
    for bad in wrong:
      text = "object()" if bad is object else repr(bad)
      yield f"{name} of a wrong type", last, [f"config.{name} = {text}"], []
      loose = f"with config.ignore_type(): config.{name} = {text}"
      yield f"{name} of a wrong type, loosened", last, [loose], []
    yield f"{name} missing", last, [f"with config.unlocked(): del config.{name}"], []
    longer = f"with config.unlocked(): config.{name}s = 1"
    yield f"{name}s unknown", f"{last}s", [longer], []
    yield f"{name}s unknown in a flag", f"{last}s", [], [f"--config.{name}s=1"]
    line = f"with config.unlocked(): {parent}['{last}_of'] = {value!r}"
    yield f"{name}_of unknown", f"{last}_of", [line], []
    if isinstance(value, int | float) and not isinstance(value, bool):
      yield f"{name} no number in a flag", last, [], [f"--config.{name}=many"]
      for bad in [-2] if isinstance(value, int) else [-2.0, "nan", "inf", "-inf"]:
        text = f"float('{bad}')" if isinstance(bad, str) else bad
        yield f"{name} = {bad}", last, [f"config.{name} = {text}"], []
        yield f"{name} = {bad} in a flag", last, [], [f"--config.{name}={bad}"]
    if isinstance(value, str) and name not in UNUSED:
      yield f"{name} no choice", last, [f"config.{name} = 'nonsense'"], []
      if value:  # where the default is empty, empty is valid
        yield f"{name} empty", last, [], [f"--config.{name}="]


DAMAGES = [*damages()]
random.Random(0).shuffle(DAMAGES)


def no_compilation():
  from mdt_jax.training import loop

  def make_program(*args):
    print("REACHED COMPILATION", flush=True)
    raise SystemExit(1)

  loop.make_program = make_program


def refusal(tmp_path, text, flags=()):
  """Asserts that the config is refused with one line, and returns the line."""
  config = tmp_path / "config.py"
  config.write_text(text)
  run = runs.Run(tmp_path / "run", *flags, config=config, before=no_compilation)
  code = run.end()
  log = run.log.read_text()
  assert code == 2, log
  assert not (tmp_path / "run").exists()
  lines = [line for line in log.splitlines() if line]
  assert len(lines) == 1 and lines[0].startswith("error: "), log
  return lines[0]


@pytest.mark.faults(short=24, whole=240)
def test_error_for_an_invalid_setting_is_one_line_that_names_it(tmp_path, fault):
  what, name, damage, flags = DAMAGES[fault]
  body = "".join(f"  {line}\n" for line in damage)
  text = (
    "from tests.faults import run_config\n"
    f"def get_config():\n  config = run_config.get_config()\n{body}  return config\n"
  )
  assert name in refusal(tmp_path, text, flags), what


@pytest.mark.parametrize("what", FILES)
def test_error_for_an_invalid_config_file_is_one_line(tmp_path, what):
  assert "--config" in refusal(tmp_path, FILES[what])


def test_there_are_at_least_240_invalid_configs():
  assert len(DAMAGES) >= 240
