"""Writes the address of the project into README.md and the notebook:

python docs/address.py

`[project.urls]` in pyproject.toml holds the address. README.md and colab/mdt.ipynb
repeat it, because GitHub and Colab show these files as they are. tests/test_address.py
fails when they differ.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "colab/mdt.ipynb"
# File -> the text before the address, and the text after the address.
PLACES = {
  "README.md": ("[![Open in Colab](docs/colab.svg)](", ")"),
  NOTEBOOK: ('ADDRESS = \\"', '\\"'),
}


def address() -> str:
  """Returns the address of the repository, without a slash at its end."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  return project["urls"]["Repository"].rstrip("/")


def notebook_link(repository: str) -> str:
  """Returns the link that opens the notebook of a repository.

  Args:
    repository: address of the repository. Colab opens notebooks of GitHub; for another
      site, the link leads to the notebook on that site.
  """
  if found := re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?", repository):
    site = "https://colab.research.google.com/github"
    return f"{site}/{found[1]}/blob/main/{NOTEBOOK}"
  return f"{repository.removesuffix('.git')}/blob/HEAD/{NOTEBOOK}"


def updated(repository: str) -> dict[str, str]:
  """Returns the text of each file of PLACES with the address of a repository.

  Raises:
    ValueError: a file does not have exactly one place for the address.
  """
  texts = {}
  for name, (before, after) in PLACES.items():
    value = repository if name == NOTEBOOK else notebook_link(repository)
    text = (ROOT / name).read_text(encoding="utf-8")
    if text.count(before) != 1:
      raise ValueError(f"{name} must have one place like {before}…{after}")
    start, _, rest = text.partition(before)
    end = rest.partition(after)[2]
    texts[name] = start + before + value + after + end
  return texts


def main() -> None:
  for name, text in updated(address()).items():
    (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
