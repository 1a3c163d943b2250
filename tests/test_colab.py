"""The notebook's cells run, except those that need a network or a shell."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "colab" / "mdt.ipynb"
# Tags of cells with shell lines or a download.
NOT_PYTHON = {"setup", "command", "download"}


@pytest.fixture
def cells():
  notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
  assert notebook["nbformat"] == 4
  return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
  return set(cell["metadata"].get("tags", ()))


def shrink(config):
  config.num_steps, config.optimizer.warmup_steps = 2, 0
  config.model.update(hidden_size=16, depth=3, num_heads=2, decode_depth=1, unroll=1)
  config.masking.num_lengths = 1
  config.eval.every = config.sample_every = 0


def test_notebook_cells_run_and_show_three_pictures(cells, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names, shown = {}, []
  for cell in cells:
    if tags(cell) & NOT_PYTHON:
      continue
    *body, last = ast.parse("".join(cell["source"])).body
    if isinstance(last, ast.Expr):  # A notebook shows its value.
      exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
      shown.append(
        eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
      )
    else:
      exec(compile(ast.Module([*body, last], []), NOTEBOOK.name, "exec"), names)
    if "settings" in tags(cell):
      shrink(names["config"])
  assert sum(isinstance(x, Image.Image) for x in shown) == 3


def test_notebook_is_stored_without_outputs(cells):
  assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
