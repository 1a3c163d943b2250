"""Files of others hold no code that is run: no pickle is ever loaded."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mdt_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What each loader has to be called with.
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
def test_nothing_that_is_pickled_is_loaded(file):
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
def test_unsafe_code_would_be_found(code):
  assert list(unsafe_lines(ast.parse(code))) == [1]
