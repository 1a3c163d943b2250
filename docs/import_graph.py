"""Draws which parts of mdt_jax import which: python docs/import_graph.py

Writes the graph into docs/architecture.md, between the two marks; --check only compares
and exits with 1 where they differ. An arrow that other arrows imply is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grimp

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- graph: python docs/import_graph.py -->\n", "<!-- end of graph -->\n"
COMMANDS = {"main", "sample", "evaluate", "encode", "convert", "plan", "demo"}
# Everything may import these; `conversion` is an old address of `pretrained`.
LEFT_OUT = {"errors", "logs", "types", "atomic", "typed_config", "sizes", "conversion"}


def read_imports() -> dict[str, set[str]]:
  """Part of the package -> parts that it imports; the commands are one part."""
  graph = grimp.build_graph("mdt_jax", cache_dir=None)

  def part(module: str) -> str:
    name = module.split(".")[1]
    return "commands" if name in COMMANDS else name

  imports: dict[str, set[str]] = {}
  for module in graph.modules - {"mdt_jax"}:
    found = imports.setdefault(part(module), set())
    for imported in graph.find_modules_directly_imported_by(module) - {"mdt_jax"}:
      found.add(part(imported))
  return {
    name: found - LEFT_OUT - {name}
    for name, found in imports.items()
    if name not in LEFT_OUT
  }


def without_implied(imports: dict[str, set[str]]) -> dict[str, set[str]]:
  """The graph without arrows that a longer path implies."""

  def reached(name: str) -> set[str]:
    below = imports[name]
    return below.union(*(reached(other) for other in below))

  return {
    name: {
      other
      for other in below
      if not any(other in reached(third) for third in below - {other})
    }
    for name, below in imports.items()
  }


def draw() -> str:
  """The graph in Mermaid, which GitHub draws."""
  arrows = sorted(
    f"  {name} --> {other}"
    for name, below in without_implied(read_imports()).items()
    for other in below
  )
  return "\n".join(["```mermaid", "flowchart TD", *arrows, "```", ""])


def main() -> None:
  text = PAGE.read_text(encoding="utf-8")
  before, rest = text.split(BEGIN)
  _, after = rest.split(END)
  drawn = before + BEGIN + draw() + END + after
  if "--check" not in sys.argv[1:]:
    PAGE.write_text(drawn, encoding="utf-8")
  elif drawn != text:
    sys.exit(f"{PAGE} shows other imports: run python docs/import_graph.py")


if __name__ == "__main__":
  main()
