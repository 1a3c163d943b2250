"""Installs the dependencies of mdt_jax, and mdt_jax itself, on a runtime of Colab.

Packages of the runtime keep their versions if mdt_jax accepts them.
"""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> list[str]:
  """The dependencies in pyproject.toml."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  return project["dependencies"]


def versions() -> dict[str, str]:
  """The installed packages and their versions."""
  importlib.invalidate_caches()
  return {found.name: found.version for found in importlib.metadata.distributions()}


def is_installed() -> bool:
  """Whether mdt_jax is installed from this repository."""
  found = importlib.util.find_spec("mdt_jax")
  return bool(found and found.origin and Path(found.origin).parents[1] == ROOT)


def install(*arguments: str) -> None:
  command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
  if code := subprocess.run(command).returncode:
    sys.exit(code)


def main() -> None:
  before = versions()
  install(*requirements())
  if not is_installed():
    install("--no-deps", "--editable", str(ROOT))
  after = versions()
  for name in sorted(before.keys() & after.keys()):
    if before[name] != after[name]:
      print(f"{name} {before[name]} was replaced by {after[name]}")


if __name__ == "__main__":
  main()
