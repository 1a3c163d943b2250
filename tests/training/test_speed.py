"""Speed: TFLOP/s, MFU, seconds and memory."""

from __future__ import annotations

import dataclasses

import pytest

from mdt_jax.errors import SettingError
from mdt_jax.training import speed as speed_module
from mdt_jax.training.speed import COMPILING, SAVING, WAITING, Speed, describe


@dataclasses.dataclass
class Device:
  """A device that reports its memory, or raises an error."""

  device_kind: str = "cpu"
  memory: dict | Exception | None = None
  process_index: int = 0
  id: int = 0

  def memory_stats(self):
    if isinstance(self.memory, Exception):
      raise self.memory
    return self.memory


class Objective:
  """`static` FLOPs an image."""

  def flops(self, static):
    return static


def test_flops_are_those_of_each_step_over_time_and_devices():
  speed = Speed(Objective(), 8, [Device(), Device()])
  speed.add_step(1e12)
  speed.add_step(2e12)
  # 3e12 FLOPs an image, 8 images, 4 seconds, 2 devices.
  assert speed.report(4.0)["tflops_per_chip"] == pytest.approx(3)
  assert speed.report(4.0)["tflops_per_chip"] == 0


def test_mfu_is_the_share_of_the_published_peak():
  speed = Speed(Objective(), 1, [Device("TPU v5 lite")])
  speed.add_step(98.5e12)
  found = speed.report(1.0)
  assert found["mfu"] == pytest.approx(0.5)
  assert "98.5 TFLOP/s a chip  MFU 50.0%" in describe(found)


def test_chip_of_unknown_peak_has_no_mfu():
  speed = Speed(Objective(), 1, [Device()])
  speed.add_step(1e12)
  found = speed.report(1.0)
  assert "mfu" not in found
  assert "1 TFLOP/s a chip" in describe(found) and "MFU" not in describe(found)


def test_unknown_network_has_no_flops_and_one_log_line(caplog):
  class Unknown:
    def flops(self, static):
      raise SettingError("model", "Own", "has no entry")

  speed = Speed(Unknown(), 1, [Device()])
  with caplog.at_level("INFO", "mdt_jax"):
    speed.add_step(None)
    speed.add_step(None)
  assert len(caplog.messages) == 1 and "Own" in caplog.text
  assert "tflops_per_chip" not in speed.report(1.0)


def test_seconds_are_added_until_the_next_report(monkeypatch):
  now = 1000.0
  monkeypatch.setattr(speed_module.time, "monotonic", lambda: now)
  speed = Speed(Objective(), 1, [Device()])
  for what, seconds in ((WAITING, 1), (SAVING, 20), (WAITING, 2), (COMPILING, 300)):
    with speed.timed(what):
      now += seconds
  found = speed.report(1.0)
  assert (found[WAITING], found[SAVING], found[COMPILING]) == (3, 20, 300)
  shown = describe(found)
  for text in ("compiling 300.0 s", "waiting for data 3.0 s", "saving 20.0 s"):
    assert text in shown
  assert set(speed.report(1.0).values()) == {0}


def test_memory_of_each_device_of_this_process_is_reported():
  memory = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}
  more = {"bytes_in_use": 2**31, "peak_bytes_in_use": 2**31}
  devices = [Device(memory=memory), Device(memory=more, id=1), Device(process_index=1)]
  found = Speed(Objective(), 1, devices).report(1.0)
  assert found["memory_gib/device_0"] == 1
  assert found["memory_peak_gib/device_0"] == 3
  assert found["memory_gib/device_1"] == found["memory_peak_gib/device_1"] == 2
  assert "memory 2.00 GiB  peak 3.00 GiB" in describe(found)


@pytest.mark.parametrize("memory", [None, {}, RuntimeError("unimplemented")])
def test_device_that_does_not_report_its_memory_is_left_out(memory):
  found = Speed(Objective(), 1, [Device(memory=memory)]).report(1.0)
  assert not any("memory" in name for name in found)
  assert "memory" not in describe(found)
