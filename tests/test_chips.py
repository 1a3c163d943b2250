"""parse_topology and the table of chips."""

import pytest

from mdt_jax.chips import CHIPS, SLICES, chip_of, parse_topology
from mdt_jax.errors import SettingError


@pytest.mark.parametrize(
  ("name", "topology", "kind", "count"),
  [
    ("v5e:16x16", "v5e:16x16", "v5e", 256),
    ("v4:4x4x4", "v4:4x4x4", "v4", 64),
    ("v5e-256", "v5e:16x16", "v5e", 256),
    ("v4-8", "v4:2x2x1", "v4", 4),
    ("cpu:8", "cpu:8", "cpu", 8),
    ("h100:8", "h100:8", "h100", 8),
    ("b200:16", "b200:16", "b200", 16),
    ("rtx4090:1", "rtx4090:1", "rtx4090", 1),
  ],
)
def test_topology_is_given_by_shape_or_by_name(name, topology, kind, count):
  found = parse_topology(name)
  assert (found.name, found.kind, found.num_devices) == (topology, kind, count)


def test_every_slice_name_equals_its_shape():
  for name, shape in SLICES.items():
    assert parse_topology(name) == parse_topology(shape)


@pytest.mark.parametrize(
  "name",
  [
    "v9:2x2",
    "v5e:16",
    "v5e:4x4x4",
    "v4:0x2x2",
    "cpu:x",
    "h200:2x4",
    "h900:8",
    "h100:0",
    "",
    "v5e-7",
    "cpu:²",
  ],
)
def test_error_for_an_unknown_topology_lists_the_known_ones(name):
  with pytest.raises(
    SettingError, match=r"accepted are v4:XxYxZ, .*v5e-256.*h100:N.*cpu:N$"
  ):
    parse_topology(name)


@pytest.mark.parametrize("name", ["cpu:4097", "cpu:99999999", "v5e:4000x4000"])
def test_topology_of_too_many_devices_is_refused(name):
  with pytest.raises(SettingError, match=r"at most (4,096|65,536) devices$") as error:
    parse_topology(name)
  assert error.value.value == name


def test_gpus_beyond_one_host_are_whole_hosts():
  with pytest.raises(SettingError, match=r"h100:12.*whole hosts of 8 GPUs"):
    parse_topology("h100:12")


def test_slices_multiply_the_devices_of_tpus():
  found = parse_topology("v5e:16x16", slices=2)
  assert (found.name, found.num_devices, found.slices) == ("v5e:16x16", 512, 2)


@pytest.mark.parametrize(
  ("name", "slices"), [("h100:8", 2), ("cpu:8", 2), ("v5e-8", 0)]
)
def test_slices_of_other_devices_are_refused(name, slices):
  with pytest.raises(SettingError, match=rf"--slices = {slices}: must be 1, or more"):
    parse_topology(name, slices)


def test_chip_numbers_are_in_base_units():
  for chip in CHIPS.values():
    assert 5e13 < chip.flops < 5e15
    assert 1e10 < chip.memory < 1e12
    assert 1e10 < chip.network < chip.bandwidth < 1e13
    assert chip.source.startswith("https://")


def test_chip_of_a_device_has_its_published_peak():
  chip = chip_of("TPU v5 lite")
  assert chip is not None and chip.flops == 197e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H200 NVL", ""])
def test_chip_of_another_device_is_unknown(kind):
  assert chip_of(kind) is None
