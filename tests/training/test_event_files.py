"""Event files are read by TensorBoard, and are written without TensorFlow."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.util.tensor_util import make_ndarray

from mdt_jax.training.event_files import EventFile
from mdt_jax.training.events import Bars


def read(folder, tag):
  """Step -> value of the tensors with a tag."""
  events = EventAccumulator(str(folder), {"tensors": 0})
  events.Reload()
  return [
    (event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)
  ]


def test_scalars_are_read_back_in_float32(tmp_path):
  file = EventFile(tmp_path)
  file.write_scalars(3, {"loss": 1.1, "norm": 2.0})
  file.write_scalars(5, {"loss": np.float32(0.25)})
  file.close()
  assert read(tmp_path, "loss") == [(3, np.float32(1.1)), (5, np.float32(0.25))]
  assert read(tmp_path, "norm") == [(3, np.float32(2.0))]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_back(tmp_path, channels):
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, channels), np.uint8)
  file = EventFile(tmp_path)
  file.write_images(4, {"samples": images})
  file.close()
  ((step, (width, height, *found)),) = read(tmp_path, "samples")
  assert (step, int(width), int(height)) == (4, 6, 4)
  for png, image in zip(found, images, strict=True):
    shown = np.asarray(Image.open(io.BytesIO(png)))
    np.testing.assert_array_equal(shown.reshape(image.shape), image)


def test_tensorboard_shows_scalars_and_images_by_their_plugins(tmp_path):
  file = EventFile(tmp_path)
  file.write_scalars(3, {"loss": 1.5})
  file.write_images(4, {"samples": np.zeros((1, 4, 4, 3), np.uint8)})
  file.close()
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  assert set(events.PluginTagToContent("scalars")) == {"loss"}
  assert set(events.PluginTagToContent("images")) == {"samples"}


def test_bars_keep_their_heights_in_the_bars_that_tensorboard_shows(tmp_path):
  file = EventFile(tmp_path)
  heights = np.arange(15.0)
  heights[3] = np.nan
  file.write_bars(4, {"loss_by_time": Bars(np.linspace(0, 3, 16), heights)})
  file.close()
  ((step, rows),) = read(tmp_path, "loss_by_time")
  assert step == 4
  np.testing.assert_allclose(rows[:, 0], np.arange(30) / 10, atol=1e-12)
  np.testing.assert_allclose(rows[:, 1], np.arange(1, 31) / 10, atol=1e-12)
  np.testing.assert_array_equal(rows[:, 2], np.nan_to_num(heights).repeat(2))


def test_layout_groups_the_losses_and_each_score(tmp_path):
  EventFile(tmp_path, 3, scores=["fid", "inception_score"]).close()
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  (event,) = events.Tensors(CONFIG_SUMMARY_TAG)
  layout = layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item())
  losses, scores = layout.category
  assert [chart.title for chart in scores.chart] == ["fid", "inception_score"]
  tags = "loss masked_loss vb loss_q2 masked_loss_q0 eval/fid eval/fid_50k skipped"
  shown = [
    {tag for tag in tags.split() for x in chart.multiline.tag if re.match(x, tag)}
    for chart in (*losses.chart, *scores.chart)
  ]
  assert shown == [
    {"loss", "masked_loss", "vb"},
    {"loss_q2"},
    {"masked_loss_q0"},
    {"eval/fid"},
    set(),
  ]


def test_each_write_reaches_the_file_at_once(tmp_path):
  file = EventFile(tmp_path)
  file.write_scalars(3, {"loss": 1.5})
  assert [step for step, _ in read(tmp_path, "loss")] == [3]
  file.close()


def test_tensorboard_replaces_events_after_the_resumed_step(tmp_path):
  killed = EventFile(tmp_path, 0)
  for step in (2, 4, 6):
    killed.write_scalars(step, {"loss": 1.0})
  resumed = EventFile(tmp_path, 4)
  for step in (6, 8):
    resumed.write_scalars(step, {"loss": 2.0})
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path))  # of TensorBoard
  events.Reload()
  found = [
    (event.step, float(make_ndarray(event.tensor_proto)))
    for event in events.Tensors("loss")
  ]
  assert found == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]


def test_file_opened_in_mid_run_keeps_all_events(tmp_path):
  EventFile(tmp_path, 0).write_scalars(2, {"loss": 1.0})
  EventFile(tmp_path, None).write_scalars(4, {"loss": 1.0})
  assert [step for step, _ in read(tmp_path, "loss")] == [2, 4]


def test_deleted_workdir_is_not_created_again(tmp_path):
  with pytest.raises(FileNotFoundError):
    EventFile(tmp_path / "deleted" / "tensorboard")


def test_writing_events_imports_no_tensorflow(tmp_path):
  code = f"""
import sys
import numpy as np
from pathlib import Path
from mdt_jax.training.event_files import EventFile
file = EventFile(Path({str(tmp_path)!r}))
file.write_scalars(3, {{"loss": 1.5}})
file.write_images(4, {{"samples": np.zeros((1, 4, 4, 3), np.uint8)}})
file.close()
sys.exit("tensorflow" in sys.modules)
"""
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
  assert [step for step, _ in read(tmp_path, "loss")] == [3]
