"""The pictures of docs/methods.md are what the networks do."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@functools.cache
def load_script():
  spec = importlib.util.spec_from_file_location("pictures", DOCS / "method_pictures.py")
  assert spec is not None and spec.loader is not None
  script = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = script  # its dataclass looks the module up
  spec.loader.exec_module(script)
  return script


def test_every_method_has_a_picture():
  pictures = {path.stem for path in (DOCS / "methods").glob("*.svg")}
  assert pictures == set(load_script().METHODS)


@pytest.mark.parametrize("name", ["maskdit", "tread"])
def test_picture_is_that_of_the_network(name):
  assert (DOCS / "methods" / f"{name}.svg").read_text() == load_script().draw(name)
