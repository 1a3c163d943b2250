"""How far are we from the released code? python -m benchmarks.parity

Runs the tests that compare with recorded outputs of the released PyTorch code, and
writes the largest difference of each comparison into the table of docs/parity.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "parity.md"
SELECTED = "matches_reference or match_reference or of_the_reference"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def measure() -> dict[str, tuple[float, float]]:
  """What is compared -> (largest difference, tolerance); exits where a test fails."""
  import pytest

  # In this process, so that what the tests record is seen here.
  code = pytest.main(["-k", SELECTED, str(ROOT / "tests")])
  if code != pytest.ExitCode.OK:
    sys.exit(int(code))
  from tests import reference

  return reference.MEASURED


def make_table(measured: dict[str, tuple[float, float]]) -> str:
  machine = f"{os.cpu_count()} cores, {platform.machine()}"
  lines = [
    f"Measured {datetime.date.today()} on {machine}, "
    f"jax {importlib.metadata.version('jax')} (`python -m benchmarks.parity`).",
    "",
    "| compared | largest difference | tolerance |",
    "| --- | --- | --- |",
  ]
  for what, (error, tolerance) in measured.items():
    shown = f"{error:.1e} | {tolerance:g}" if tolerance else "none | bit-identical"
    lines.append(f"| {what} | {shown} |")
  return "\n".join(lines)


def main() -> None:
  table = make_table(measure())
  page = PAGE.read_text()
  before, rest = page.split(BEGIN)
  _, after = rest.split(END)
  PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
  print(table)


if __name__ == "__main__":
  main()
