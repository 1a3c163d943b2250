"""The notebook's cells run; git, pip, Google Drive and downloads are faked."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mdt_jax.logs import logger

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab" / "mdt.ipynb"
ADDRESS = "https://example.org/someone/mdt_jax.git"


def code_cells():
  notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
  assert notebook["nbformat"] == 4
  return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
  return set(cell["metadata"].get("tags", ()))


def make_repository(folder):
  (folder / "mdt_jax").mkdir(parents=True)
  (folder / "mdt_jax" / "settings.py").touch()
  return folder


class FirstCell:
  """Runs the first cell in a folder, with other programs faked."""

  def __init__(self, folder, monkeypatch):
    self.folder = folder
    self.drive = folder / "drive"
    self.commands = []
    self.git_code = self.install_code = 0
    self.names = {}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", self._run)

  def _run(self, command, **options):
    self.commands.append(command)
    if command[0] != "git":
      return subprocess.CompletedProcess(command, self.install_code, "", "pip says\n")
    if not self.git_code:
      make_repository(Path(command[-1]))
    return subprocess.CompletedProcess(command, self.git_code, "", "fatal: no\n")

  def __call__(self, source):
    """Runs the cell with this SOURCE; returns the folder that it changes into."""
    text = "".join(code_cells()[0]["source"])
    assert 'SOURCE = ""' in text
    text = text.replace('SOURCE = ""', f"SOURCE = {source!r}")
    text = text.replace('"/content/drive"', repr(str(self.drive)))
    exec(compile(text, NOTEBOOK.name, "exec"), self.names)
    assert self.commands[-1][-1] == "colab/install.py"
    assert sys.path[0] == os.getcwd()
    return Path.cwd()

  def refusal(self, source):
    """Runs the cell, which stops; returns the lines that IPython shows."""
    with pytest.raises(Exception) as caught:
      self(source)
    return caught.value._render_traceback_()


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
  return FirstCell(tmp_path, monkeypatch)


def zipped(path, *, top=""):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr(f"{top}README.md", "")
    file.writestr(f"{top}mdt_jax/settings.py", "")
  return path


def test_empty_source_finds_the_clone_above_the_notebook(tmp_path, monkeypatch):
  make_repository(tmp_path)
  (tmp_path / "colab").mkdir()
  assert FirstCell(tmp_path / "colab", monkeypatch)("") == tmp_path


def test_empty_source_outside_a_clone_says_in_one_line_what_to_set(first_cell):
  (line,) = first_cell.refusal("")
  assert "\n" not in line and "SOURCE" in line
  assert first_cell.commands == []


def test_git_address_is_cloned_once(first_cell):
  folder = first_cell.folder / "mdt_jax"
  for _ in range(2):
    assert first_cell(ADDRESS) == folder
  clones = [command for command in first_cell.commands if command[0] == "git"]
  assert [command[-2:] for command in clones] == [(ADDRESS, str(folder))]


def test_failed_clone_shows_the_lines_of_git_and_one_sentence(first_cell, capsys):
  first_cell.git_code = 128
  (line,) = first_cell.refusal(ADDRESS)
  assert line.startswith("git clone failed")
  assert "fatal: no" in capsys.readouterr().out


@pytest.mark.parametrize("top", ["", "mdt_jax-main/"])
def test_zip_file_is_extracted(first_cell, top):
  zipped(first_cell.folder / "mdt_jax-main.zip", top=top)
  for _ in range(2):  # the folder of the first run stays the base of SOURCE
    assert first_cell(" mdt_jax-main.zip") == first_cell.folder / "mdt_jax-main" / top


def test_folder_is_used_where_it_is(first_cell):
  repository = make_repository(first_cell.folder / "somewhere" / "mine")
  assert first_cell(str(repository)) == repository


@pytest.mark.parametrize("source", ["missing", "empty", "notes.txt"])
def test_source_without_mdt_jax_is_named_in_one_line(first_cell, source):
  (first_cell.folder / "empty").mkdir()
  (first_cell.folder / "notes.txt").touch()
  (line,) = first_cell.refusal(source)
  assert "\n" not in line and f"{source} holds no mdt_jax" in line


@pytest.mark.parametrize("is_zip", [False, True])
def test_google_drive_is_mounted_if_it_is_not_there(first_cell, monkeypatch, is_zip):
  mounted = []

  def mount(path):
    mounted.append(path)
    make_repository(first_cell.drive / "MyDrive" / "mine")
    zipped(first_cell.drive / "MyDrive" / "mine.zip")

  colab = types.ModuleType("google.colab")
  colab.drive = types.SimpleNamespace(mount=mount)
  monkeypatch.setitem(sys.modules, "google.colab", colab)
  source = first_cell.drive / "MyDrive" / ("mine.zip" if is_zip else "mine")
  expected = first_cell.folder / "mine" if is_zip else source
  for _ in range(2):
    assert first_cell(str(source)) == expected
  assert mounted == [str(first_cell.drive)]


def test_failed_installation_ends_in_one_sentence(first_cell, capsys):
  make_repository(first_cell.folder)
  first_cell.install_code = 1
  (line,) = first_cell.refusal("")
  assert "colab/install.py failed" in line
  assert "pip says" in capsys.readouterr().out


@pytest.fixture
def install(monkeypatch):
  """colab/install.py, with pip faked: `commands` holds the arguments of each call."""
  spec = importlib.util.spec_from_file_location("install", ROOT / "colab/install.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  module.commands = []

  def run(command):
    module.commands.append(command[command.index("install") + 1 :])
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, "run", run)
  return module


def test_install_asks_for_no_tensorflow(install, monkeypatch):
  monkeypatch.setattr(install, "is_installed", lambda: False)
  install.main()
  dependencies, package = install.commands
  assert any(line.startswith("jax>=") for line in dependencies)
  assert any(line.startswith("tensorboard>=") for line in dependencies)
  assert not any(line.startswith("tensorflow") for line in dependencies)
  assert package[-3:] == ["--no-deps", "--editable", str(ROOT)]


def test_install_names_each_replaced_version(install, monkeypatch, capsys):
  before = {"absl-py": "1.4.0", "jax": "0.7.2"}
  found = iter([before, {**before, "absl-py": "2.1"}])
  monkeypatch.setattr(install, "versions", lambda: next(found))
  install.main()
  assert capsys.readouterr().out == "absl-py 1.4.0 was replaced by 2.1\n"


@pytest.fixture
def restored_logger():
  """Undoes what the notebook sets, for the tests after this one."""
  level, propagate, handlers = logger.level, logger.propagate, logger.handlers
  yield
  logger.setLevel(level)
  logger.propagate, logger.handlers = propagate, handlers


def shrink(config):
  config.num_steps, config.optimizer.warmup_steps = 2, 0
  config.model.update(hidden_size=16, depth=3, num_heads=2, decode_depth=1, unroll=1)
  config.masking.num_lengths = 1
  config.eval.every = config.sample_every = 0
  config.sampling.num_steps = 2


def test_other_cells_run_and_show_three_pictures_and_scores(
  tmp_path, monkeypatch, restored_logger
):
  monkeypatch.chdir(tmp_path)
  names, shown = {}, []
  for cell in code_cells()[1:]:
    if "download" in tags(cell):
      continue
    *body, last = ast.parse("".join(cell["source"])).body
    if isinstance(last, ast.Expr):  # A notebook shows its value.
      exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
      shown.append(
        eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
      )
    else:
      exec(compile(ast.Module([*body, last], []), NOTEBOOK.name, "exec"), names)
    if "settings" in tags(cell):
      shrink(names["config"])
  assert sum(isinstance(x, Image.Image) for x in shown) == 3
  assert set(shown[-1]) == {"frechet", "accuracy", "diversity"}


def test_notebook_asks_for_a_tpu():
  metadata = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["metadata"]
  assert metadata["accelerator"] == "TPU"


def test_notebook_is_stored_without_outputs():
  for cell in code_cells():
    assert not cell["outputs"] and cell["execution_count"] is None
