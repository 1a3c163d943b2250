"""Published figures of accelerators, and the topologies of TPU slices."""

from __future__ import annotations

import dataclasses

from mdt_jax.errors import SettingError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip.

  Attributes:
    name: name of the chip in JAX's topologies.
    flops: peak bfloat16 floating-point operations per second.
    memory: bytes of high-bandwidth memory that a program can use.
    bandwidth: bytes per second from and to the high-bandwidth memory.
    network: bytes per second to the other chips of a slice, in one direction, over all
      links together.
    source: web page of the figures.
    dimensions: dimensions of a TPU's torus; 0 for chips that XLA can only compile for
      on a machine with the chip.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  network: float
  source: str
  dimensions: int = 0


_TPU_SOURCE = "https://cloud.google.com/tpu/docs/{}"
# Network: half of the bidirectional figure of the page. Memory: a program can use 15.75
# of the 16 GiB of v5e, as measured; for other TPUs the compiler checks the limit.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 32 * GIB, 1.2e12, 300e9, _TPU_SOURCE.format("v4"), 3),
    Chip("v5e", 197e12, 15.75 * GIB, 0.819e12, 200e9, _TPU_SOURCE.format("v5e"), 2),
    Chip("v5p", 459e12, 95 * GIB, 2.765e12, 600e9, _TPU_SOURCE.format("v5p"), 3),
    Chip("v6e", 918e12, 32 * GIB, 1.6e12, 400e9, _TPU_SOURCE.format("v6e"), 2),
    Chip(
      "h200",
      989e12,
      141e9,
      4.8e12,
      450e9,
      "https://www.nvidia.com/en-us/data-center/h200",
    ),
  )
}

# device_kind of JAX -> name of the chip. Other models of a chip, such as an H200 NVL, have
# other figures and other kinds.
KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA A100-SXM4-40GB": "a100",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
  "NVIDIA GeForce RTX 4090": "rtx4090",
}

# Cloud TPU's name of a slice -> topology. The number counts cores for v4 and v5p, and
# chips otherwise.
SLICES = {
  "v4-8": "v4:2x2x1",
  "v5e-8": "v5e:2x4",
  "v5e-256": "v5e:16x16",
  "v5p-128": "v5p:4x4x4",
  "v6e-8": "v6e:2x4",
  "v6e-256": "v6e:16x16",
}

# Limits of a plan: JAX starts 4,096 simulated devices in half a minute, and no pod has
# more than 10,000 chips.
MAX_CPUS = 4096
MAX_CHIPS = 65_536


@dataclasses.dataclass(frozen=True)
class Topology:
  """The devices to plan for.

  Attributes:
    name: topology in the syntax of XLA's TPU compiler, such as "v5e:16x16"; or "cpu:N"
      for N simulated devices.
    kind: name of the chip, or "cpu".
    num_devices: number of devices.
  """

  name: str
  kind: str
  num_devices: int


def chip_of(device_kind: str) -> Chip | None:
  """Returns the chip of a device; None if its figures are unknown.

  Args:
    device_kind: `device_kind` of a device of JAX, such as "TPU v5 lite".
  """
  return CHIPS.get(KINDS.get(device_kind, ""))


def parse_topology(name: str) -> Topology:
  """Parses a topology.

  Args:
    name: topology such as "v5e:16x16", name of a slice such as "v5e-256", or "cpu:N".

  Raises:
    SettingError: the chip is unknown, the shape is invalid, or the topology has more
      devices than a plan can have.
  """
  kind, _, shape = SLICES.get(name, name).partition(":")
  sizes = shape.split("x")
  dimensions = 1 if kind == "cpu" else getattr(CHIPS.get(kind), "dimensions", 0)
  known = dimensions > 0 and len(sizes) == dimensions
  if not known or not all(_is_count(size) for size in sizes):
    tpus = ", ".join(
      f"{chip.name}:{'x'.join('XYZ'[: chip.dimensions])}"
      for chip in CHIPS.values()
      if chip.dimensions
    )
    raise SettingError(
      "--topology", name, f"accepted are {tpus}, {', '.join(SLICES)} and cpu:N"
    )
  num_devices = 1
  for size in sizes:
    num_devices *= int(size)
  largest = MAX_CPUS if kind == "cpu" else MAX_CHIPS
  if num_devices > largest:
    raise SettingError("--topology", name, f"must have at most {largest:,} devices")
  return Topology(f"{kind}:{shape}", kind, num_devices)


def _is_count(text: str) -> bool:
  """Whether a text is a whole number of at least 1, of at most 9 digits."""
  return text.isdecimal() and len(text) <= 9 and int(text) > 0
