"""TensorBoard events, and logged errors for events that cannot be written."""

from __future__ import annotations

import importlib.abc
import logging
import sys

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdt_jax.training import events as events_module
from mdt_jax.training.events import Events, tolerate


def tags(folder):
  found = EventAccumulator(str(folder), {"tensors": 0})
  found.Reload()
  return {
    tag: [event.step for event in found.Tensors(tag)] for tag in found.Tags()["tensors"]
  }


def test_scalars_and_images_are_written(tmp_path):
  events = Events(tmp_path)
  events.write_scalars(3, {"loss": 1.5})
  events.write_images(4, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
  events.close()
  assert tags(tmp_path) == {"loss": [3], "samples": [4]}


def test_events_without_a_folder_write_nothing():
  events = Events(None)
  events.write_scalars(3, {"loss": 1.5})
  events.close()


def test_training_without_tensorflow_logs_one_line(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # import raises ImportError
  with caplog.at_level(logging.INFO, "mdt_jax"):
    events = Events(tmp_path)
    events.write_scalars(3, {"loss": 1.5})
    events.write_images(4, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
    events.close()
  assert len(caplog.messages) == 1
  assert "tensorflow" in caplog.messages[0]
  assert not any(tmp_path.iterdir())


def test_tensorflow_that_protobuf_breaks_is_like_none(tmp_path, monkeypatch, caplog):
  class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
      if name == "tensorflow":
        raise TypeError("Descriptors cannot\nbe created directly")

  monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
  monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
  with caplog.at_level(logging.INFO, "mdt_jax"):
    Events(tmp_path).write_scalars(3, {"loss": 1.5})
  assert "Descriptors cannot be created directly" in caplog.messages[0]
  assert not any(tmp_path.iterdir())


def test_failed_write_is_logged_and_a_new_file_started(tmp_path, monkeypatch, caplog):
  events = Events(tmp_path)
  now = 1000.0
  monkeypatch.setattr(events_module.time, "monotonic", lambda: now)

  def full(step, scalars):
    raise OSError("no space\nleft")

  monkeypatch.setattr(events._writer, "write_scalars", full)
  with caplog.at_level(logging.ERROR, "mdt_jax"):
    events.write_scalars(1, {"loss": 1.0})
  assert "NOT WRITTEN" in caplog.text and "no space left" in caplog.text
  events.write_scalars(2, {"loss": 1.0})  # Too soon for another try.
  now += events_module.SECONDS_BETWEEN_TRIES
  events.write_scalars(3, {"loss": 1.0})
  events.close()
  assert tags(tmp_path) == {"loss": [3]}


def test_tolerated_error_is_logged_with_its_name(caplog):
  with caplog.at_level(logging.ERROR, "mdt_jax"), tolerate("the picture of step 5"):
    raise OSError("full")
  assert "NOT WRITTEN: the picture of step 5: full" in caplog.text
