"""The structure described in docs/architecture.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_graph_in_the_docs_matches_the_code():
  command = [sys.executable, "docs/import_graph.py", "--check"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


def test_core_modules_do_not_import_heavy_libraries():
  code = (
    "import sys, mdt_jax, mdt_jax.models, mdt_jax.objectives, mdt_jax.training.step\n"
    "heavy = {'tensorflow', 'torch', 'tensorflow_datasets', 'sklearn', 'clu', "
    "'ml_collections'}\n"
    "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
