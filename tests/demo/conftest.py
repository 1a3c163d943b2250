"""A demo that runs for all tests; Ctrl-C ends it."""

from __future__ import annotations

import pytest

from tests.demo.serving import Demo
from tests.sampling.test_pipeline import save_tiny


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
  running = Demo(save_tiny(tmp_path_factory.mktemp("run")))
  yield running
  assert running.end() == 130
  assert running.files() == []
