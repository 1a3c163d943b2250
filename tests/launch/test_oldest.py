"""launch/oldest.txt, the constraints for tests with the oldest versions."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_oldest_versions_are_the_lower_bounds_of_the_package():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  named = [
    *project["dependencies"],
    *(line for extra in ("gcs", "tfds", "wandb", "test") for line in extras[extra]),
  ]
  bounds = [line.replace(">=", "==", 1) for line in named if ">=" in line]
  lines = (ROOT / "launch" / "oldest.txt").read_text().splitlines()
  assert [line for line in lines if not line.startswith("#")] == bounds
