"""Accelerators: what they can do at best, and the slices they come in."""

from __future__ import annotations

import dataclasses

from mdt_jax.errors import SettingError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip.

  Attributes:
    name: as JAX's topologies spell it.
    flops: bfloat16 operations per second at best.
    memory: bytes of high-bandwidth memory; of TPUs, what a program may take.
    bandwidth: bytes per second of that memory.
    network: bytes per second to the other chips of a slice, in one direction, all
      links together.
    source: where the figures stand.
    dimensions: of the torus, for TPUs; 0 for what XLA cannot compile for from afar.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  network: float
  source: str
  dimensions: int = 0


_TPU_SOURCE = "https://cloud.google.com/tpu/docs/{}"
# Network: the bidirectional figure of the page, halved. Memory: v5e lets a program
# take 15.75 of its 16 GiB, measured; of the others the compiler refuses by itself.
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

# Slices by the name they are ordered under: cores for v4 and v5p, else chips.
SLICES = {
  "v4-8": "v4:2x2x1",
  "v5e-8": "v5e:2x4",
  "v5e-256": "v5e:16x16",
  "v5p-128": "v5p:4x4x4",
  "v6e-8": "v6e:2x4",
  "v6e-256": "v6e:16x16",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to plan for.

  Attributes:
    name: as XLA's TPU compiler takes it, "v5e:16x16"; "cpu:8" for simulated devices.
    kind: "cpu", or the name of a chip.
    num_devices: of the slice.
  """

  name: str
  kind: str
  num_devices: int


def parse_topology(name: str) -> Topology:
  """Reads "v5e:16x16", the name of a slice such as "v5e-256", or "cpu:8"."""
  kind, _, shape = SLICES.get(name, name).partition(":")
  sizes = shape.split("x")
  dimensions = 1 if kind == "cpu" else getattr(CHIPS.get(kind), "dimensions", 0)
  known = dimensions > 0 and len(sizes) == dimensions
  if not known or not all(size.isdigit() and int(size) for size in sizes):
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
  return Topology(f"{kind}:{shape}", kind, num_devices)
