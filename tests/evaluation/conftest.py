from __future__ import annotations

import numpy as np
import pytest

from mdt_jax.logs import logger
from tests.evaluation.cheap import photos


@pytest.fixture(scope="session")
def files(tmp_path_factory):
  """A folder with real.npz and fake.npz."""
  folder = tmp_path_factory.mktemp("files")
  np.savez(folder / "real.npz", *photos(60, 0))
  np.savez(folder / "fake.npz", *photos(45, 1))
  return folder


@pytest.fixture
def warnings(monkeypatch):
  """Warnings logged by mdt_jax during the test."""
  lines = []
  monkeypatch.setattr(logger, "warning", lambda text, *args: lines.append(text % args))
  return lines
