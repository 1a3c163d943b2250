"""The commands of the README run in order on a fresh clone, and so does the Python.

A `python` and a `pip` at the start of PATH make the commands cheap: networks are tiny,
training has few steps, and pip installs nothing. Small files stand in for released
weights. tests/test_docs.py checks the flags of all commands, also of those that this
file leaves out.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import mdt_jax
from mdt_jax.checkpoints.converted import from_torch_file
from mdt_jax.models.registry import init_params
from tests import fresh_clone
from tests.pretrained.hub_cache import HubCache

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FIXTURES = ROOT / "tests" / "fixtures"

# Start of a command that does not run -> why.
LEFT_OUT = {
  "bash launch/test.sh": "runs this test",
  "python -m mdt_jax.main --config=configs/mdtv2_s2.py": "ImageNet, and days",
  "python launch/local_processes.py": "tests/launch/test_local_processes.py runs it",
  "python -m mdt_jax.encode": "ImageNet; tests/pretrained/test_encoding.py runs it",
  "python -m mdt_jax.convert --inception": "the weights of Inception",
  "python -m mdt_jax.evaluate --inception": "the weights of Inception",
  "python -m mdt_jax.convert --push": "a network",
}
# Text in a Python block that does not run -> why.
BLOCKS_LEFT_OUT = {
  'config.diffusion.process = "mine"': "names a process of the reader",
  "FeatureExtractor(": "names features and files of the reader",
  'METRICS["fdd"]': "names features of the reader",
  "import pandas": "pandas is no dependency",
  'network="MDTv2")': "names inputs of the reader",
  'labels=["golden retriever", 388]': "names an image of the reader, of 256x256 pixels",
  'from_pretrained("ORG/NAME")': "a network",
  "MyNet(width=64)": "names a network of the reader",
  "pipeline.draw(condition=": "names arrays of the reader",
}
PAGES_LEFT_OUT = {"use_the_parts.md": "tests/test_use_the_parts.py runs it"}

PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip"*) echo "$@" >> pip_calls; exit ;;
  *mdt_jax.main*) set -- "$@" --config.num_steps=2 --config.optimizer.warmup_steps=0 \\
    --config.model.hidden_size=16 --config.model.depth=4 --config.model.num_heads=2 \\
    --config.model.unroll=1 --config.masking.num_lengths=1 --config.eval.every=0 \\
    --config.sample_every=0 --config.sampling.num_steps=4 ;;
  *mdt_jax.convert*SiT-XL-2*) set -- "$@" --num_heads=2 ;;
  *mdt_jax.sample*) set -- "$@" --num_images=20 ;;
  *mdt_jax.evaluate*--samples=*) ;;
  *mdt_jax.evaluate*) set -- "$@" --num_images=20 ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""
PIP = """#!/usr/bin/env bash
echo "$@" >> pip_calls
"""


def blocks(page, language):
  text = re.sub(r"\n +```", "\n```", page.read_text())  # a block inside a list
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
  """The commands of the README, in order, each on one line."""
  for block in blocks(README, "shell"):
    for line in block.replace("\\\n", " ").splitlines():
      if words := shlex.split(line, comments=True):
        yield shlex.join(words)


def left_out(command):
  return [start for start in LEFT_OUT if command.startswith(start)]


COMMANDS = [command for command in commands() if not left_out(command)]
PROGRAMS = {}  # page -> its Python blocks that run, as one program
for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
  runs = [
    block
    for block in blocks(page, "python")
    if not any(text in block for text in BLOCKS_LEFT_OUT)
  ]
  if runs and page.name not in PAGES_LEFT_OUT:
    PROGRAMS[page.name] = "\n".join(runs)


class Reader:
  """Somebody who follows the README in a fresh clone.

  Attributes:
    clone: the folder of the clone.
  """

  def __init__(self, folder: Path):
    self.clone = fresh_clone.clone(folder)
    programs = folder / "environment" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("pip", PIP)):
      (programs / name).write_text(text)
      (programs / name).chmod(stat.S_IRWXU)
    hub = HubCache(folder / "hub")
    vae = FIXTURES / "vae"
    hub.add("stabilityai/sd-vae-ft-ema", {file.name: file for file in vae.iterdir()})
    self._environment = {
      **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VENV")},
      **hub.environment,
      "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
      "VENV": str(programs.parent),
    }

  def run(self, *command: str) -> tuple[int, str]:
    done = subprocess.run(
      command,
      cwd=self.clone,
      env=self._environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    return done.returncode, done.stdout

  def run_python(self, program: str) -> tuple[int, str]:
    return self.run("python", "-c", program)


def write_released(path: Path) -> None:
  """Writes a tiny MDTv2 as the released code does."""
  torch = pytest.importorskip("torch", reason="comes with the test extra")
  sizes = dict(input_size=8, in_channels=4, num_classes=1000, depth=4, decode_depth=2)
  attributes = dict(hidden_size=16, num_heads=2, **sizes)
  params = init_params(
    mdt_jax.create_model("MDTv2-S/2", **attributes), jax.random.key(0)
  )
  tensors = mdt_jax.to_torch({"variant": "MDTv2", **attributes}, params)
  torch.save({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
  reader = Reader(tmp_path_factory.mktemp("reader"))
  weights = reader.clone / "mdt_xl2_v2_ckpt.pt"
  write_released(weights)
  from_torch_file(weights, reader.clone / "runs" / "mdtv2_s2")
  (reader.clone / "SiT-XL-2-256x256.pt").symlink_to(FIXTURES / "sit.pt")
  code, out = reader.run_python(PROGRAMS["sampling.md"])  # image.png, mask.png
  assert code == 0, out
  return reader


@pytest.fixture(scope="module")
def results(reader):
  """Exit code and output of each command; all run, in order."""
  return {command: reader.run("bash", "-c", command) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme_runs(results, command):
  code, out = results[command]
  assert code == 0, out


def test_commands_write_what_the_readme_says(reader, results):
  for path in (
    "runs/digits/checkpoints",
    "runs/digits/metrics.jsonl",
    "runs/digits/samples/samples.npz",
    "runs/digits/inpainted/samples.png",
    "runs/digits/edited/samples.png",
    "some_digits/samples.npz",
    "samples/samples.npz",
    "runs/mdtv2_xl2/samples/samples.png",
    "runs/sit_xl2/checkpoints",
    "mdtv2_s2.safetensors",
  ):
    assert (reader.clone / path).exists(), path


def test_pip_is_asked_for_extras_that_exist(reader, results):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  calls = (reader.clone / "pip_calls").read_text().splitlines()
  assert calls
  for call in calls:
    *_, target = shlex.split(call)
    extra = re.fullmatch(r"\.(?:\[(\w+)\])?", target)
    assert extra, call
    assert extra[1] is None or extra[1] in project["optional-dependencies"], call


@pytest.mark.parametrize("page", PROGRAMS)
def test_python_of_the_page_runs_and_prints_what_it_says(reader, results, page):
  code, out = reader.run_python(PROGRAMS[page])
  assert code == 0, out
  printed = re.findall(r"^print\(.*\)  # (\([^)]*\))", PROGRAMS[page], re.MULTILINE)
  for text in printed:
    assert text in out.splitlines()


def test_everything_that_is_left_out_exists():
  all_blocks = "\n".join(
    block for page in (ROOT / "docs").glob("*.md") for block in blocks(page, "python")
  )
  assert [text for text in BLOCKS_LEFT_OUT if text not in all_blocks] == []
  used = {start for command in commands() for start in left_out(command)}
  assert used == set(LEFT_OUT)
