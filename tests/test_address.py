"""The address of the project has one place; `python docs/address.py` copies it."""

from __future__ import annotations

import importlib.util
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][
  "Repository"
]


def load(path):
  spec = importlib.util.spec_from_file_location("address", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def address():
  return load(ROOT / "docs" / "address.py")


def test_readme_and_notebook_have_the_address_of_pyproject(address):
  for name, text in address.updated(ADDRESS).items():
    same = (ROOT / name).read_text(encoding="utf-8") == text
    assert same, f"{name} has another address: run python docs/address.py"


def test_no_other_file_has_the_address():
  # The site reads it, see docs/site_hooks.py.
  found = subprocess.run(
    ["git", "grep", "--untracked", "--name-only", "--fixed-strings", ADDRESS],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stderr
  names = set(found.stdout.splitlines())
  assert names == {"README.md", "colab/mdt.ipynb", "pyproject.toml"}


def test_script_copies_a_new_address(tmp_path, address):
  for name in ("docs/address.py", "pyproject.toml", *address.PLACES):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "pyproject.toml":
      text = text.replace(ADDRESS, "https://github.com/someone/mdt/")
    (tmp_path / name).write_text(text, encoding="utf-8")
  load(tmp_path / "docs" / "address.py").main()
  badge = (
    "https://colab.research.google.com/github/someone/mdt/blob/main/colab/mdt.ipynb"
  )
  assert f"({badge})" in (tmp_path / "README.md").read_text(encoding="utf-8")
  notebook = (tmp_path / "colab/mdt.ipynb").read_text(encoding="utf-8")
  assert r"ADDRESS = \"https://github.com/someone/mdt\"" in notebook
  assert ADDRESS not in notebook


@pytest.mark.parametrize(
  ("repository", "link"),
  [
    (
      "https://github.com/a/b",
      "https://colab.research.google.com/github/a/b/blob/main/colab/mdt.ipynb",
    ),
    (
      "https://github.com/a/b.git",
      "https://colab.research.google.com/github/a/b/blob/main/colab/mdt.ipynb",
    ),
    (
      "https://example.org/a/b.git",
      "https://example.org/a/b/blob/HEAD/colab/mdt.ipynb",
    ),
  ],
)
def test_link_opens_the_notebook(address, repository, link):
  assert address.notebook_link(repository) == link


def test_file_without_a_place_for_the_address_is_refused(address, monkeypatch):
  monkeypatch.setitem(address.PLACES, "LICENSE", ("ADDRESS = ", "\n"))
  with pytest.raises(ValueError, match="LICENSE"):
    address.updated(ADDRESS)
