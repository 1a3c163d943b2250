"""The faults of tests/mutations.py still fit the code."""

from __future__ import annotations

import pytest

from tests.mutations import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_fault_replaces_one_place(name):
  fault = FAULTS[name]
  text = (ROOT / "mdt_jax" / fault.file).read_text()
  assert text.count(fault.right) == 1
  assert all((ROOT / "tests" / path).exists() for path in fault.tests.split())
