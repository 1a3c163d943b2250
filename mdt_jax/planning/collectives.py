"""Counts the bytes that a compiled program sends between devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from mdt_jax.planning import hlo

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
BETWEEN_SLICES = " between slices"
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


@dataclasses.dataclass
class Traffic:
  """All collectives of one kind in one run of a program.

  Attributes:
    calls: number of calls.
    sent: bytes that each device sends in all calls, if each collective uses a ring.
  """

  calls: int = 0
  sent: float = 0.0


def collectives(text: str, num_devices: int, num_slices: int = 1) -> dict[str, Traffic]:
  """Counts the collectives of a compiled program; a loop multiplies by its trip count.

  Args:
    text: HLO text, from `jax.stages.Compiled.as_text()`.
    num_devices: number of devices of a collective without replica groups.
    num_slices: number of TPU slices.

  Returns:
    Kind of the collective -> calls and bytes. Kinds that end with BETWEEN_SLICES use
    the network between slices.
  """
  found: dict[str, Traffic] = {}
  entry, computations = hlo.parse(text)
  sent = {
    name: list(_collectives_of(name, computation, num_devices, num_slices))
    for name, computation in _without_repeats(computations).items()
  }
  for name, times in hlo.runs(entry, computations):
    for kind, size in sent[name]:
      traffic = found.setdefault(kind, Traffic())
      traffic.calls += times
      traffic.sent += times * size
  return found


def _without_repeats(
  computations: dict[str, hlo.Computation],
) -> dict[str, hlo.Computation]:
  """Leaves out collectives that have been seen.

  On TPUs, several fusions can belong to one collective, with one channel id.
  """
  seen: set[tuple[str, str]] = set()

  def is_new(operation: hlo.Operation) -> bool:
    channel = _CHANNEL.search(operation.line)
    key = (operation.opcode.removesuffix("-start"), channel[1] if channel else "")
    if not channel or key[0] not in KINDS or key not in seen:
      seen.add(key)
      return True
    return False

  return {
    name: dataclasses.replace(
      computation,
      operations={k: o for k, o in computation.operations.items() if is_new(o)},
    )
    for name, computation in computations.items()
  }


def _collectives_of(
  name: str, computation: hlo.Computation, num_devices: int, num_slices: int
) -> Iterator[tuple[str, float]]:
  """Yields (kind, bytes that a device sends) of the collectives of a computation."""
  for operation in computation.operations.values():
    if transfer := _TRANSFER.search(operation.line):
      # The TPU's compiler sends from the hosts of one slice to those of others.
      if operation.opcode == "send":
        kind = transfer[1].lower().replace("_", "-")
        sent = _sent(kind, operation.bytes[0], num_slices)
        yield kind + BETWEEN_SLICES, sent
      continue
    kind = operation.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    # The result of a *-start lists operands, results and synchronization flags.
    is_start = operation.opcode.endswith("-start")
    size = max(operation.bytes) if is_start else sum(operation.bytes)
    group = _group_size(operation.line, num_devices)
    if name.startswith("all-reduce-scatter"):
      # A kernel of TPUs that sums and keeps a part: each device sends as much as if the
      # result, which is whole here, were gathered.
      yield "reduce-scatter", _sent("all-gather", size, group)
    else:
      yield kind, _sent(kind, size, group)


def _group_size(line: str, num_devices: int) -> int:
  """Number of devices in a replica group of a collective, from its HLO line."""
  if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return groups[1].count(",") + 1
  if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
    return int(groups[2])
  if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))
  return num_devices


def _sent(kind: str, size: int, group: int) -> float:
  """Bytes that each device sends in a ring algorithm.

  Args:
    kind: kind of the collective.
    size: bytes of the result.
    group: number of devices.
  """
  share = (group - 1) / group
  match kind:
    case "all-reduce":
      return 2 * share * size
    case "reduce-scatter":  # the result is one part of the input
      return share * size * group
    case "collective-permute":
      return size
    case _:
      return share * size
