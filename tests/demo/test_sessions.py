"""Sessions of a running demo: many at once, closed ones, memory, files, the end."""

from __future__ import annotations

import io
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.demo.serving import NO_GRADIO, NO_GRADIO_REASON, Demo, Session, read_config
from tests.sampling.test_pipeline import save_tiny

pytestmark = pytest.mark.skipif(NO_GRADIO, reason=NO_GRADIO_REASON)


@pytest.fixture(scope="module")
def config(demo):
  return read_config(demo)


def pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)))


def test_twenty_sessions_at_once_get_their_own_pictures(demo, config):
  found: dict[int, bytes] = {}

  def draw(seed):
    found[seed] = Session(demo, config).draw(seed=seed)

  threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(20)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert sorted(found) == list(range(20))
  assert len({pixels(data).tobytes() for data in found.values()}) == 20
  again = Session(demo, config).draw(seed=7)
  np.testing.assert_array_equal(pixels(again), pixels(found[7]))


def test_a_closed_session_makes_room_for_the_next(demo, config):
  leaving = Session(demo, config)
  messages = leaving.press("draw-go", [["3"], 16, 0, 250, "ddpm", 2.0, 4.0])
  for message in messages:
    if message["msg"] == "process_generating":
      break
  messages.close()
  leaving.close()
  start = time.monotonic()
  assert Session(demo, config).draw()
  assert time.monotonic() - start < 60
  assert demo.is_alive


@pytest.mark.parametrize(
  "fields",
  [
    [[], 1, 0, 2, "ddpm", 2.0, 4.0],
    [["no such class"], 1, 0, 2, "ddpm", 2.0, 4.0],
    [["3"], 9, 0, 10_000, "ddpm", 2.0, 4.0],
    [["3"], 1, -5, 2, "ddpm", 2.0, 4.0],
    [["3"], 1, None, 2, "ddpm", 2.0, 4.0],
    [["3"], 1, 0, 2, "sde", 2.0, 4.0],
  ],
)
def test_bad_fields_end_with_a_sentence(demo, config, fields):
  last = None
  for message in Session(demo, config).press("draw-go", fields):
    last = message
  assert last is not None
  assert last["msg"] == "process_completed"
  assert demo.is_alive
  assert Session(demo, config).draw()


def test_memory_stays_level(demo, config, request):
  """After 200 pictures, memory is within 10% of that after 20; here, after 80."""
  session, whole = Session(demo, config), request.config.getoption("--all-faults")
  last = 200 if whole else 80
  for count in range(1, last + 1):
    session.draw(seed=count)
    if count == 20:
      first = demo.memory()
  assert demo.memory() < 1.1 * first


def test_files_lie_in_one_temporary_folder(demo):
  (folder,) = demo.files()
  assert folder.name.startswith("mdt_jax_demo_")


def test_sigterm_ends_the_demo_and_removes_its_files(tmp_path, request):
  """The fixture `demo` tests Ctrl-C."""
  if not request.config.getoption("--all-faults"):
    pytest.skip("starts another demo; --all-faults runs it")
  ending = Demo(save_tiny(tmp_path / "run"))
  Session(ending, read_config(ending)).draw()
  assert ending.files()
  assert ending.end(signal.SIGTERM) == 75
  assert ending.files() == []
