"""Published figures of accelerators, and the topologies of TPU slices and GPUs."""

from __future__ import annotations

import dataclasses

from mdt_jax.errors import SettingError
from mdt_jax.gpus import TARGETS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip.

  Attributes:
    name: name of the chip in JAX's topologies.
    flops: peak bfloat16 floating-point operations per second.
    memory: bytes of the chip's memory that a program can use.
    bandwidth: bytes per second from and to the chip's memory.
    network: bytes per second to the other chips of a slice or host, in one direction,
      over all links together.
    source: web page of the figures.
    dimensions: dimensions of a TPU's torus; 0 for GPUs.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  network: float
  source: str
  dimensions: int = 0


# Share of a GPU's memory that a program can use if the environment variable
# XLA_PYTHON_CLIENT_MEM_FRACTION is 0.95. JAX uses 0.75 of it otherwise.
GPU_SHARE = 0.95


def _gpu(name: str, flops: float, network: float, page: str) -> Chip:
  """Returns the figures of a GPU; `flops` and `network` as `Chip` has them."""
  target = TARGETS[name]
  source = f"https://www.nvidia.com/en-us/{page}"
  memory = GPU_SHARE * target.memory
  return Chip(name, flops, memory, target.bandwidth, network, source)


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
    # Dense products. NVLink for A100 to B200; PCI Express for the others.
    _gpu("a100", 312e12, 300e9, "data-center/a100"),
    _gpu("h100", 989e12, 450e9, "data-center/h100"),
    _gpu("h200", 989e12, 450e9, "data-center/h200"),
    _gpu("b200", 2250e12, 900e9, "data-center/dgx-b200"),
    _gpu("rtx4090", 165e12, 32e9, "geforce/graphics-cards/40-series/rtx-4090"),
    _gpu("rtx4080", 97e12, 32e9, "geforce/graphics-cards/40-series/rtx-4080-family"),
    _gpu("t4", 65e12, 16e9, "data-center/tesla-t4"),  # float16; it has no bfloat16
  )
}

# device_kind of JAX -> name of the chip. Other models of a chip, such as an H200 NVL,
# have other figures and other kinds.
KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA A100-SXM4-40GB": "a100",
  "NVIDIA H200": "h200",
  **{target.description: name for name, target in TARGETS.items()},
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
GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Topology:
  """The devices to plan for.

  Attributes:
    name: topology in the syntax of XLA's TPU compiler, such as "v5e:16x16"; "h100:8"
      for 8 GPUs; or "cpu:N" for N simulated devices.
    kind: name of the chip, or "cpu".
    num_devices: number of devices, of all slices.
    slices: number of TPU slices of this topology.
  """

  name: str
  kind: str
  num_devices: int
  slices: int = 1


def chip_of(device_kind: str) -> Chip | None:
  """Returns the chip of a device; None if its figures are unknown.

  Args:
    device_kind: `device_kind` of a device of JAX, such as "TPU v5 lite".
  """
  return CHIPS.get(KINDS.get(device_kind, ""))


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Parses a topology.

  Args:
    name: topology such as "v5e:16x16", name of a slice such as "v5e-256", "h100:N" for
      GPUs, or "cpu:N".
    slices: number of TPU slices of this topology.

  Raises:
    SettingError: the chip is unknown, the shape is invalid, the topology has more
      devices than a plan can have, hosts with fewer than 8 of several GPUs, or slices
      without TPUs.
  """
  kind, _, shape = SLICES.get(name, name).partition(":")
  sizes = shape.split("x")
  one_number = kind == "cpu" or kind in TARGETS
  dimensions = 1 if one_number else getattr(CHIPS.get(kind), "dimensions", 0)
  known = dimensions > 0 and len(sizes) == dimensions
  if not known or not all(_is_count(size) for size in sizes):
    tpus = ", ".join(
      f"{chip.name}:{'x'.join('XYZ'[: chip.dimensions])}"
      for chip in CHIPS.values()
      if chip.dimensions
    )
    raise SettingError(
      "--topology",
      name,
      f"accepted are {tpus}, {', '.join(SLICES)}, "
      f"{', '.join(f'{gpu}:N' for gpu in TARGETS)} and cpu:N",
    )
  if slices < 1 or (slices > 1 and (kind == "cpu" or kind in TARGETS)):
    raise SettingError("--slices", slices, "must be 1, or more for slices of TPUs")
  num_devices = slices
  for size in sizes:
    num_devices *= int(size)
  largest = MAX_CPUS if kind == "cpu" else MAX_CHIPS
  if num_devices > largest:
    raise SettingError("--topology", name, f"must have at most {largest:,} devices")
  if kind in TARGETS and num_devices > GPUS_OF_A_HOST and num_devices % GPUS_OF_A_HOST:
    raise SettingError(
      "--topology", name, f"must be whole hosts of {GPUS_OF_A_HOST} GPUs"
    )
  return Topology(f"{kind}:{shape}", kind, num_devices, slices)


def _is_count(text: str) -> bool:
  """Whether a text is a whole number of at least 1, of at most 9 digits."""
  return text.isdecimal() and len(text) <= 9 and int(text) > 0
