"""The installed package has every module, config and data file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lists the files of a wheel as setuptools chooses them, without building anything.
LIST_FILES = """
from setuptools.dist import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
distribution.include_package_data = False  # only the globs of pyproject.toml count
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
for _, _, path in command.find_all_modules():
  print(path)
for _, folder, _, names in command.data_files:
  for name in names:
    print(f"{folder}/{name}")
"""


def test_wheel_holds_every_file_of_the_package():
  pytest.importorskip("setuptools", minversion="77", reason="reads pyproject.toml")
  result = subprocess.run(
    [sys.executable, "-c", LIST_FILES], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  held = set(result.stdout.splitlines())
  files = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "mdt_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  ]
  assert "mdt_jax/configs/digits.py" in files
  assert sorted(set(files) - held) == []


def test_configs_folder_of_a_clone_links_to_the_package():
  assert (ROOT / "configs").resolve() == (ROOT / "mdt_jax" / "configs").resolve()
