"""Event files of TensorBoard, written without TensorFlow.

The file format and the protocol buffers are those of the package tensorboard, which
reads the files too. Its own `EventFileWriter` imports TensorFlow where TensorFlow is
installed, which takes seconds and the memory of a GPU. The package tensorboardX ends
its thread at the first failed write, and then blocks the caller once its queue is full.
Both work in threads of their own; here `events.Background` provides the thread.
"""

# pyright: reportAttributeAccessIssue=false
# Protocol buffers create their classes when they are imported.

from __future__ import annotations

import io
import itertools
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.compat.proto import tensor_shape_pb2 as shape_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from mdt_jax.buckets import AnyPath, AppendedObject
from mdt_jax.training.events import Bars

# TensorBoard shows a histogram as this number of bars of equal width.
SHOWN_BARS = 30

_numbers = itertools.count()  # of the event files of this process


class EventFile:
  """A new event file; each call writes its events to the file at once.

  Args:
    folder: folder of the event files of the run.
    start: number of steps done before; TensorBoard then ignores the events of later
      steps in earlier files. None: all earlier events stay.
    scores: names of the scores of the run, such as "fid"; each has a chart under
      "Custom scalars", beside the losses.
  """

  def __init__(
    self, folder: AnyPath, start: int | None = None, scores: Sequence[str] = ()
  ):
    folder.mkdir(exist_ok=True)  # a workdir that was deleted stays deleted
    # TensorBoard reads the files of a folder in the order of their names.
    name = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
    path = folder / f"events.out.tfevents.{name}.{next(_numbers):06d}"
    self._file: Any
    self._file = path.open("xb") if isinstance(path, Path) else AppendedObject(path)
    self._records = RecordWriter(self._file)
    self._write(file_version="brain.Event:2")
    if start is not None:
      # From the second START on, TensorBoard ignores earlier events of its step and
      # of later ones.
      log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(step=start + 1, session_log=log)
    layout = {layout_metadata.CONFIG_SUMMARY_TAG: _layout(scores)}
    self._write_values(start or 0, layout_metadata.create_summary_metadata(), layout)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics by name, after `step` steps."""
    metadata = scalar_metadata.create_summary_metadata(None, None)
    self._write_values(
      step,
      metadata,
      {
        name: tensor_pb2.TensorProto(
          dtype=types_pb2.DT_FLOAT, float_val=[np.float32(value)]
        )
        for name, value in scalars.items()
      },
    )

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 images (N, H, W, C) by name, after `step` steps."""
    metadata = image_metadata.create_summary_metadata(None, None)
    self._write_values(
      step, metadata, {name: _images(array) for name, array in images.items()}
    )

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """Writes bar charts by name, after `step` steps, as histograms."""
    metadata = histogram_metadata.create_summary_metadata(None, None)
    self._write_values(
      step, metadata, {name: _histogram(bar) for name, bar in bars.items()}
    )

  def close(self) -> None:
    """Closes the file."""
    self._records.close()

  def _write_values(
    self, step: int, metadata: Any, tensors: Mapping[str, tensor_pb2.TensorProto]
  ) -> None:
    """Writes one event with a tensor for each name."""
    values = [
      summary_pb2.Summary.Value(tag=name, metadata=metadata, tensor=tensor)
      for name, tensor in tensors.items()
    ]
    self._write(step=step, summary=summary_pb2.Summary(value=values))
    self._file.flush()

  def _write(self, **fields: Any) -> None:
    """Writes an event to the buffer of the file."""
    event = event_pb2.Event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())


def _images(images: np.ndarray) -> tensor_pb2.TensorProto:
  """The tensor of TensorBoard's plugin: width, height, and each image as PNG."""
  height, width = images.shape[1:3]
  strings = [b"%d" % width, b"%d" % height]
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    strings.append(file.getvalue())
  dim = shape_pb2.TensorShapeProto.Dim(size=len(strings))
  return tensor_pb2.TensorProto(
    dtype=types_pb2.DT_STRING,
    tensor_shape=shape_pb2.TensorShapeProto(dim=[dim]),
    string_val=strings,
  )


def _histogram(bars: Bars) -> tensor_pb2.TensorProto:
  """The tensor of TensorBoard's plugin: left edge, right edge and height of each bar.

  The plugin spreads the heights over SHOWN_BARS bars, as counts. Each bar is therefore
  split into equal parts of its height, so that TensorBoard shows this height.
  """
  parts = max(1, SHOWN_BARS // len(bars.heights))
  count = parts * len(bars.heights)
  at = np.arange(count + 1) / parts
  edges = np.interp(at, np.arange(len(bars.edges)), bars.edges)
  heights = np.nan_to_num(bars.heights).repeat(parts)
  rows = np.stack([edges[:-1], edges[1:], heights], axis=1)
  dims = [shape_pb2.TensorShapeProto.Dim(size=size) for size in rows.shape]
  return tensor_pb2.TensorProto(
    dtype=types_pb2.DT_DOUBLE,
    tensor_shape=shape_pb2.TensorShapeProto(dim=dims),
    double_val=rows.ravel().tolist(),
  )


def _layout(scores: Sequence[str]) -> tensor_pb2.TensorProto:
  """The tensor of the plugin "Custom scalars": which curves share a chart."""
  parts = "(loss|mse|vb)$"
  charts = {
    "losses": {
      "losses": [parts, f"masked_{parts}"],
      "loss by quartile of the times": ["loss_q[0-3]$"],
      "masked loss by quartile of the times": ["masked_loss_q[0-3]$"],
    },
    "scores": {name: [f"eval/{re.escape(name)}$"] for name in scores},
  }
  layout = layout_pb2.Layout(
    category=[
      layout_pb2.Category(
        title=title,
        chart=[
          layout_pb2.Chart(
            title=name, multiline=layout_pb2.MultilineChartContent(tag=tags)
          )
          for name, tags in of_category.items()
        ],
      )
      for title, of_category in charts.items()
      if of_category
    ]
  )
  return tensor_pb2.TensorProto(
    dtype=types_pb2.DT_STRING, string_val=[layout.SerializeToString()]
  )
