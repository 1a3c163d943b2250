"""Writes tables of measurements to pages of docs/."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def machine() -> str:
  """Date, machine and JAX version, for the line above a table."""
  return (
    f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
    f"jax {importlib.metadata.version('jax')}"
  )


def write_table(page: str, name: str, lines: list[str]) -> None:
  """Prints lines and writes them to a page of docs/, between two markers.

  Args:
    page: file name in docs/.
    name: name of the markers <!-- name --> and <!-- end of name -->.
    lines: new lines between the markers.
  """
  file = DOCS / page
  begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  before, rest = file.read_text().split(begin)
  _, after = rest.split(end)
  file.write_text("\n".join([before + begin, *lines, end + after]))
  print("\n".join(lines))
