"""Measures the difference from the released code: python -m benchmarks.parity

Runs the tests that compare with recorded outputs of the released PyTorch code, and
writes the largest difference of each comparison to the table in docs/parity.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.tables import machine, write_table

TESTS = Path(__file__).parents[1] / "tests"
SELECTED = "matches_reference or match_reference or of_the_reference"


def measure() -> dict[str, tuple[float, float]]:
  """Returns name -> (largest difference, tolerance); exits if a test fails."""
  import pytest

  # pytest runs in this process, because the tests record differences in a global dict.
  code = pytest.main(["-k", SELECTED, str(TESTS)])
  if code != pytest.ExitCode.OK:
    sys.exit(int(code))
  from tests import reference

  return reference.MEASURED


def main() -> None:
  lines = [
    f"{machine()} (`python -m benchmarks.parity`).",
    "",
    "| compared | largest difference | tolerance |",
    "| --- | --- | --- |",
  ]
  for what, (error, tolerance) in measure().items():
    shown = f"{error:.1e} | {tolerance:g}" if tolerance else "none | bit-identical"
    lines.append(f"| {what} | {shown} |")
  write_table("parity.md", "table", lines)


if __name__ == "__main__":
  main()
