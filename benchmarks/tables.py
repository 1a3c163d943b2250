"""Tables of measurements in docs/."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def machine() -> str:
  """The line under which figures stand."""
  return (
    f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
    f"jax {importlib.metadata.version('jax')}"
  )


def write_table(page: str, name: str, lines: list[str]) -> None:
  """Replaces what stands between <!-- name --> and its end on a page of docs/."""
  file = DOCS / page
  begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
  before, rest = file.read_text().split(begin)
  _, after = rest.split(end)
  file.write_text("\n".join([before + begin, *lines, end + after]))
  print("\n".join(lines))
