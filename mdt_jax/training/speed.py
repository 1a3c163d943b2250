"""How fast a run is, and what it waits for: TFLOP/s, MFU, seconds, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax

from mdt_jax.chips import GIB, chip_of
from mdt_jax.errors import one_line
from mdt_jax.logs import logger
from mdt_jax.objectives import Objective

COMPILING, WAITING, SAVING = "compile_seconds", "data_wait_seconds", "save_seconds"
TFLOPS, MFU = "tflops_per_chip", "mfu"
# Prefixes of the scalars of a device, before its number.
MEMORY, PEAK = "memory_gib/device_", "memory_peak_gib/device_"


class Speed:
  """Counts model FLOPs and seconds between two reports.

  Args:
    objective: counts the operations of a step on one image.
    batch_size: images per step.
    devices: devices of the run, of all processes.
  """

  def __init__(self, objective: Objective, batch_size: int, devices: Sequence[Any]):
    self._objective = objective
    self._batch_size, self._devices = batch_size, devices
    self._chip = chip_of(devices[0].device_kind)
    self._flops_of: dict[Hashable, float] = {}  # by the value of `static`
    self._counts = True
    self.reset()

  def reset(self) -> None:
    """Sets all counts to 0."""
    self._flops = 0.0
    self._seconds: dict[str, float] = dict.fromkeys((COMPILING, WAITING, SAVING), 0.0)

  def add_step(self, static: Hashable) -> None:
    """Counts the operations of a step; see `Objective.flops`.

    A network or an objective of the user's own may not know them; then there are no
    figures of TFLOP/s.
    """
    if not self._counts:
      return
    try:
      if static not in self._flops_of:
        self._flops_of[static] = self._batch_size * self._objective.flops(static)
      self._flops += self._flops_of[static]
    except Exception as error:  # code of the user
      logger.info("no TFLOP/s are counted: %s", one_line(error))
      self._counts = False

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Counts the time of the block.

    Args:
      what: `COMPILING`, `WAITING` or `SAVING`.
    """
    start = time.monotonic()
    try:
      yield
    finally:
      self._seconds[what] += time.monotonic() - start

  def report(self, seconds: float) -> dict[str, float]:
    """Returns the scalars since the last report, and resets the counts.

    Args:
      seconds: time of the steps since the last report, without pauses.

    Returns:
      Seconds spent compiling, waiting for data and in saves. "tflops_per_chip": model
      FLOPs, as `models.flops` counts them, of a device in 1e12 a second. "mfu": their
      share of the chip's peak in bfloat16, in [0, 1]; without it if the peak is
      unknown. Memory of each device of this process in GiB: in use, and the peak since
      the start; without it if the backend does not report it.
    """
    scalars = dict(self._seconds)
    if self._counts and seconds > 0:
      flops = self._flops / seconds / len(self._devices)
      scalars[TFLOPS] = flops / 1e12
      if self._chip is not None:
        scalars[MFU] = flops / self._chip.flops
    self.reset()
    return scalars | _memory(self._devices)


def describe(scalars: dict[str, float]) -> str:
  """The part of a log line that shows the scalars of `Speed.report`."""
  parts = []
  if TFLOPS in scalars:
    parts.append(f"{scalars[TFLOPS]:.3g} TFLOP/s a chip")
  if MFU in scalars:
    parts.append(f"MFU {scalars[MFU]:.1%}")
  if scalars[COMPILING]:
    parts.append(f"compiling {scalars[COMPILING]:.1f} s")
  parts.append(f"waiting for data {scalars[WAITING]:.1f} s")
  parts.append(f"saving {scalars[SAVING]:.1f} s")
  for text, prefix in (("memory", MEMORY), ("peak", PEAK)):
    found = [value for name, value in scalars.items() if name.startswith(prefix)]
    if found:  # of the fullest device
      parts.append(f"{text} {max(found):.2f} GiB")
  return "  ".join(parts)


def _memory(devices: Sequence[Any]) -> dict[str, float]:
  """Memory in use, and its peak, of each device of this process, in GiB."""
  scalars = {}
  for device in devices:
    if device.process_index != jax.process_index():
      continue
    try:
      found = device.memory_stats() or {}
    except Exception:  # backends that do not report it raise various types
      found = {}
    for prefix, key in ((MEMORY, "bytes_in_use"), (PEAK, "peak_bytes_in_use")):
      if key in found:
        scalars[f"{prefix}{device.id}"] = found[key] / GIB
  return scalars
