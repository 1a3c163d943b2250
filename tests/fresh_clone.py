"""A fresh clone of the working tree, with changes that are not committed yet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _git(folder: Path, *arguments: str) -> str:
  command = ["git", "-C", str(folder), *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_repository(folder: Path) -> Path:
  """Makes a git repository with one commit: the files of the working tree.

  Files that git ignores are left out, as in a clone.
  """
  listed = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
  for name in filter(None, listed.split("\0")):
    source, target = ROOT / name, folder / name
    if source.exists():  # not deleted since the last commit
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(source, target, follow_symlinks=False)
  _git(folder, "init", "--quiet", "--initial-branch=main")
  _git(folder, "add", "--all", "--force")
  author = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
  _git(folder, *author, "commit", "--quiet", "--no-verify", "--message=the tree")
  return folder


def clone(folder: Path) -> Path:
  """Clones the working tree into `folder`/mdt_jax, and returns this path."""
  repository = make_repository(folder / "repository")
  target = folder / "mdt_jax"
  _git(folder, "clone", "--quiet", "--depth=1", repository.as_uri(), str(target))
  return target
