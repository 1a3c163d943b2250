"""The package never loads a pickle, so files from others cannot run code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mdt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The argument that each loader needs.
SAFE = {
  "np.load": ("allow_pickle", False),
  "numpy.load": ("allow_pickle", False),
  "torch.load": ("weights_only", True),
}


def unsafe_lines(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = {getattr(node, "module", None) or "", *(a.name for a in node.names)}
      if {name.split(".")[0] for name in names} & UNSAFE:
        yield node.lineno
    if isinstance(node, ast.Call) and ast.unparse(node.func) in SAFE:
      name, value = SAFE[ast.unparse(node.func)]
      given = {k.arg: k.value for k in node.keywords}
      if name not in given or ast.literal_eval(given[name]) is not value:
        yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_module_loads_no_pickle(file):
  assert list(unsafe_lines(ast.parse(file.read_text()))) == []


@pytest.mark.parametrize(
  "code",
  [
    "import pickle",
    "from joblib import load",
    "np.load(path)",
    "np.load(path, allow_pickle=True)",
    "torch.load(path, weights_only=False)",
  ],
)
def test_check_finds_unsafe_code(code):
  assert list(unsafe_lines(ast.parse(code))) == [1]
