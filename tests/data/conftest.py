"""Fixtures shared by the tests of data."""

from __future__ import annotations

import pytest

from mdt_jax.logs import logger
from tests.data.folders import write_image


@pytest.fixture
def three(tmp_path):
  """Three images of one class, filled with 1, 2 and 3."""
  for value in (1, 2, 3):
    write_image(tmp_path / f"{value}.png", value)
  return tmp_path


@pytest.fixture
def warnings(monkeypatch):
  """Warnings logged by mdt_jax during the test."""
  lines = []
  monkeypatch.setattr(logger, "warning", lambda text, *args: lines.append(text % args))
  return lines
