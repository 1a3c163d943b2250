"""Events: writers in threads, failed writes, slow writers."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from mdt_jax.training import events as events_module
from mdt_jax.training.events import Background, Events, tolerate


class Memory:
  """Keeps what is written, and the argument that it was opened with."""

  def __init__(self, opened_with=None):
    self.opened_with = opened_with
    self.steps, self.is_closed = [], False

  def write_scalars(self, step, scalars):
    self.steps.append(step)

  def write_images(self, step, images):
    self.steps.append(step)

  def close(self):
    self.is_closed = True


@pytest.fixture
def opened():
  """The writers that `background` opens."""
  return []


def open_into(opened, kind=Memory):
  def open_writer(step):
    opened.append(kind(step))
    return opened[-1]

  return open_writer


def test_writer_of_the_package_gets_scalars_and_images_in_order(opened):
  events = Events([Background("memory", open_into(opened), start=2)])
  events.write_scalars(3, {"loss": 1.5})
  events.write_images(4, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
  events.close()
  (memory,) = opened
  assert (memory.opened_with, memory.steps, memory.is_closed) == (2, [3, 4], True)


def test_events_without_writers_write_nothing():
  events = Events()
  events.write_scalars(3, {"loss": 1.5})
  events.close()


def test_going_back_reopens_the_writer_with_the_step(opened):
  events = Events([Background("memory", open_into(opened), start=0)])
  events.write_scalars(3, {"loss": 1.5})
  events.go_back(2)
  events.write_scalars(3, {"loss": 1.5})
  events.close()
  assert [memory.opened_with for memory in opened] == [0, 2]
  assert [memory.is_closed for memory in opened] == [True, True]


def test_failed_write_is_logged_and_the_writer_opened_again(
  opened, monkeypatch, caplog
):
  now = 1000.0
  monkeypatch.setattr(events_module.time, "monotonic", lambda: now)

  class Full(Memory):
    def write_scalars(self, step, scalars):
      if step == 1:
        raise OSError("no space\nleft")
      super().write_scalars(step, scalars)

  background = Background("events", open_into(opened, Full), start=0)
  events = Events([background])
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    events.write_scalars(1, {"loss": 1.0})
    events.write_scalars(2, {"loss": 1.0})  # too soon for another try
    wait_for(background)
  assert caplog.messages == ["NOT WRITTEN: events: no space left"]
  now += events_module.SECONDS_BETWEEN_TRIES
  events.write_scalars(3, {"loss": 1.0})
  events.close()
  assert [memory.steps for memory in opened] == [[], [3]]
  assert [memory.opened_with for memory in opened] == [0, None]


def test_failed_writer_is_closed_before_the_next_is_opened(opened, monkeypatch, caplog):
  monkeypatch.setattr(events_module, "SECONDS_BETWEEN_TRIES", 0)

  class Failing(Memory):
    def write_scalars(self, step, scalars):
      raise OSError("full")

    def close(self):
      super().close()
      raise OSError("still full")

  were_closed = []

  def open_writer(step):
    were_closed.extend(writer.is_closed for writer in opened)
    return open_into(opened, Memory if opened else Failing)(step)

  events = Events([Background("events", open_writer, start=0)])
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    events.write_scalars(1, {"loss": 1.0})
    events.write_scalars(2, {"loss": 1.0})
    events.close()
  assert were_closed == [True]
  assert opened[-1].steps == [2]
  assert caplog.messages == ["NOT WRITTEN: events: full"]


def test_step_to_resume_from_survives_a_failed_opening(opened, monkeypatch):
  monkeypatch.setattr(events_module, "SECONDS_BETWEEN_TRIES", 0)
  failures = [OSError("full")]

  def open_writer(step):
    if failures:
      raise failures.pop()
    return open_into(opened)(step)

  events = Events([Background("events", open_writer, start=5)])
  events.write_scalars(6, {"loss": 1.0})
  events.close()
  assert [(memory.opened_with, memory.steps) for memory in opened] == [(5, [6])]


def wait_for(background):
  """Waits until the thread has made the calls so far."""
  done = threading.Event()
  background._put(done.set, is_write=False)
  assert done.wait(60)


def test_hanging_writer_does_not_delay_the_caller(monkeypatch, caplog):
  monkeypatch.setattr(events_module, "MAX_WAITING", 2)
  monkeypatch.setattr(events_module, "SECONDS_TO_CLOSE", 0.01)
  answers = threading.Event()

  class Hanging(Memory):
    def write_scalars(self, step, scalars):
      answers.wait(60)

  events = Events([Background("events", Hanging, start=0)])
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    for step in range(10):
      events.write_scalars(step, {"loss": 1.0})
    events.close()
  answers.set()
  assert caplog.messages[0] == "NOT WRITTEN: events: earlier writes take too long"
  assert caplog.messages[-1] == (
    "NOT WRITTEN: events: the last writes take more than 0.01 s"
  )


def test_failing_writer_of_the_caller_does_not_stop_the_others(caplog):
  class Broken(Memory):
    def write_scalars(self, step, scalars):
      raise ValueError("broken")

  memory = Memory()
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    Events(writers=[Broken(), memory]).write_scalars(1, {"loss": 1.0})
  assert memory.steps == [1]
  assert "NOT WRITTEN: scalars by Broken: broken" in caplog.text


def test_tolerated_error_is_logged_with_its_name(caplog):
  with caplog.at_level(logging.ERROR, "mdt_jax"), tolerate("the picture of step 5"):
    raise OSError("full")
  assert "NOT WRITTEN: the picture of step 5: full" in caplog.text
