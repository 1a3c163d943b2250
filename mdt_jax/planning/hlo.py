"""Counts the bytes that a compiled program sends between devices, from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # bits of a dtype

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CONSTANT = re.compile(r" = [su]32\[\]\S* constant\((\d+)\)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
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


@dataclasses.dataclass
class _Collective:
  """A collective: its kind, the bytes of its result, and the devices of a group."""

  kind: str
  bytes: int
  group: int


@dataclasses.dataclass
class _Computation:
  """An HLO computation.

  Attributes:
    collectives: collectives of the computation.
    calls: calls of other computations, as (name, number of calls, condition). The
      number is None for a loop without a known trip count.
    constant: last integer constant of the computation.
  """

  collectives: list[_Collective] = dataclasses.field(default_factory=list)
  calls: list[tuple[str, int | None, str]] = dataclasses.field(default_factory=list)
  constant: int = 1


def collectives(text: str, num_devices: int) -> dict[str, Traffic]:
  """Counts the collectives of a compiled program; a loop multiplies by its trip count.

  Args:
    text: HLO text, from `jax.stages.Compiled.as_text()`.
    num_devices: number of devices of a collective without replica groups.

  Returns:
    Kind of the collective -> calls and bytes.
  """
  entry, computations = _parse(text, num_devices)
  found: dict[str, Traffic] = {}

  def walk(name: str, times: int) -> None:
    computation = computations[name]
    for operation in computation.collectives:
      traffic = found.setdefault(operation.kind, Traffic())
      traffic.calls += times
      traffic.sent += times * _sent(operation)
    for called, turns, condition in computation.calls:
      # A loop without a known trip count runs from 0 to the constant of its condition.
      if turns is None:
        turns = computations[condition].constant
      walk(called, times * turns)

  walk(entry, 1)
  return found


def _parse(text: str, num_devices: int) -> tuple[str, dict[str, _Computation]]:
  """Parses HLO text into (name of the entry computation, computations by name)."""
  entry, computation = "", _Computation()
  computations: dict[str, _Computation] = {}
  seen: set[tuple[str, str]] = set()
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      entry = start[2] if start[1] else entry
      computation = computations[start[2]] = _Computation()
      continue
    operation = _OPERATION.match(line)
    if not operation:
      continue
    _, result, opcode = operation.groups()
    if constant := _CONSTANT.search(line):
      computation.constant = int(constant[1])
    if opcode in ("while", "fusion", "call", "async-start", "conditional"):
      trips, condition = _TRIPS.search(line), _CONDITION.search(line)
      turns = int(trips[1]) if trips else None if opcode == "while" else 1
      called = _CALLED.findall(line)
      if branches := _BRANCHES.search(line):
        called += [name.strip(" %") for name in branches[1].split(",")]
      for name in called:
        computation.calls.append((name, turns, condition[1] if condition else ""))
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    if channel := _CHANNEL.search(line):
      # On TPUs, several fusions can belong to one collective, with one channel id.
      if (kind, channel[1]) in seen:
        continue
      seen.add((kind, channel[1]))
    sizes = [_bytes(*array) for array in _ARRAY.findall(result)]
    # The result of a *-start lists operands, results and synchronization flags.
    size = max(sizes) if opcode.endswith("-start") else sum(sizes)
    computation.collectives.append(
      _Collective(kind, size, _group_size(line, num_devices))
    )
  return entry, computations


def _bytes(dtype: str, shape: str) -> int:
  """Bytes of an array in HLO notation, such as f32[8,16]."""
  bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
  return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


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


def _sent(operation: _Collective) -> float:
  """Bytes that each device sends in a ring algorithm."""
  share = (operation.group - 1) / operation.group
  match operation.kind:
    case "all-reduce":
      return 2 * share * operation.bytes
    case "reduce-scatter":  # `bytes` counts the result, which is one part of the input
      return share * operation.bytes * operation.group
    case "collective-permute":
      return operation.bytes
    case _:
      return share * operation.bytes
