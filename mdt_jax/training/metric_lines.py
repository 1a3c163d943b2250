"""WORKDIR/metrics.jsonl: the metrics of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mdt_jax.atomic import atomic_write
from mdt_jax.buckets import AnyPath, AppendedObject
from mdt_jax.logs import counted, logger
from mdt_jax.training.events import Bars

FILE = "metrics.jsonl"


class MetricLines:
  """Appends a line for each call of `write_scalars` and `write_bars`.

  A line holds "step" (training steps done), "time" (seconds since 1970) and the
  metrics. A number that is not finite is null. Bars are a list of numbers of 6 digits.
  A step may have several lines, such as one for the loss and one for the scores. Each
  line is handed to the operating system at once, so that a killed process loses at most
  its last line. In a bucket, a killed process loses the lines of the last seconds, see
  `AppendedObject`.

  Args:
    path: path of the file.
    start: number of steps done before; lines of later steps are removed, because the
      run repeats these steps. None: only damaged lines are removed.
  """

  def __init__(self, path: AnyPath, start: int | None = None):
    _remove_invalid_lines(path, start)
    self._file: Any
    if isinstance(path, Path):
      self._file = path.open("ab", buffering=0)
    else:
      self._file = AppendedObject(path)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes metrics by name, after `step` steps."""
    numbers = {name: float(value) for name, value in scalars.items()}
    self._write_line(
      step, {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    )

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes nothing: the file holds no images."""

  def write_bars(self, step: int, bars: Mapping[str, Bars]) -> None:
    """Writes the heights of bar charts by name, after `step` steps, as lists."""
    self._write_line(step, {name: _numbers(bar.heights) for name, bar in bars.items()})

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write_line(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends a line."""
    line = {"step": step, "time": round(time.time(), 3), **values}
    data = json.dumps(line, allow_nan=False).encode() + b"\n"
    if (written := self._file.write(data)) != len(data):
      raise OSError(f"only {written} of {len(data)} bytes of a line were written")


def _numbers(array: np.ndarray) -> list[float | None]:
  """Rounds numbers to 6 significant digits, for short lines."""
  return [float(f"{x:.6g}") if math.isfinite(x) else None for x in array.tolist()]


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
  """Returns the undamaged lines of the file, as dicts."""
  lines = path.read_bytes().splitlines(keepends=True)
  return [found for line in lines if (found := _parse(line)) is not None]


def _remove_invalid_lines(path: AnyPath, start: int | None) -> None:
  """Removes damaged lines, and the lines of later steps than `start`."""
  try:
    lines = path.read_bytes().splitlines(keepends=True)
  except FileNotFoundError:
    return
  found = [(line, _parse(line)) for line in lines]
  whole = [(line, entry) for line, entry in found if entry is not None]
  kept = [line for line, entry in whole if start is None or entry["step"] <= start]
  if len(kept) == len(lines):
    return
  if damaged := len(lines) - len(whole):
    logger.warning("%s: %s removed", path, counted(damaged, "damaged line"))
  with atomic_write(path) as partial:
    partial.write_bytes(b"".join(kept))


def _parse(line: bytes) -> dict[str, Any] | None:
  """The entry of a line; None if the line is damaged."""
  try:
    entry = json.loads(line.decode())
  except (ValueError, RecursionError):
    return None
  is_whole = line.endswith(b"\n") and isinstance(entry, dict)
  return entry if is_whole and isinstance(entry.get("step"), int) else None
