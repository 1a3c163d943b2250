"""Reads the HLO text of a compiled program, and counts the bytes that it moves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

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
_NAME = re.compile(r"%([\w.-]+)")
_NUMBERS = re.compile(r"(\.\d+|\.clone|\.remat)+$")  # at the end of a name
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
# Operations that run no kernel of their own.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
)
_SLICES = ("dynamic-slice", "slice", "gather")  # read parts of their first operand


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
class Moved:
  """All kernels of one kind in one run of a program.

  Attributes:
    calls: number of calls.
    bytes: bytes that the kernels read and write, if nothing stays in a cache.
  """

  calls: int = 0
  bytes: float = 0.0


@dataclasses.dataclass
class _Operation:
  """An HLO operation.

  Attributes:
    name: name in its computation.
    opcode: such as "fusion".
    bytes: sizes of the arrays of the result.
    operands: names of the operands.
    line: the whole line.
  """

  name: str
  opcode: str
  bytes: list[int]
  operands: list[str]
  line: str

  @property
  def is_root(self) -> bool:
    """Whether the result is that of the computation."""
    return self.line.lstrip().startswith("ROOT ")


@dataclasses.dataclass
class _Computation:
  """An HLO computation.

  Attributes:
    operations: name -> operation, in the order of the text.
    calls: calls of other computations, as (name, number of calls, condition). The
      number is None for a loop without a known trip count.
    constant: last integer constant of the computation.
  """

  operations: dict[str, _Operation] = dataclasses.field(default_factory=dict)
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
  found: dict[str, Traffic] = {}
  entry, computations = _parse(text)
  sent = {
    name: list(_collectives_of(computation, num_devices))
    for name, computation in _without_repeats(computations).items()
  }
  for name, times in _runs(entry, computations):
    for kind, size in sent[name]:
      traffic = found.setdefault(kind, Traffic())
      traffic.calls += times
      traffic.sent += times * size
  return found


def kernels(text: str) -> dict[str, Moved]:
  """Counts the bytes that the kernels of a compiled program read and write.

  A fused kernel counts its operands and results, not what is inside; of an operand that
  it only slices, or a result that it updates in place, it counts that part.

  Args:
    text: HLO text, from `jax.stages.Compiled.as_text()`.

  Returns:
    Kind -> calls and bytes, those that move most first. A kind is XLA's name of a
    fusion without its number, the target of a custom call, or else an operation.
  """
  found: dict[str, Moved] = {}
  entry, computations = _parse(text)
  for name, times in _runs(entry, computations, into_fusions=False):
    computation = computations[name]
    for operation in computation.operations.values():
      if operation.opcode in _FREE:
        continue
      moved = found.setdefault(_kind(operation), Moved())
      moved.calls += times
      moved.bytes += times * _moved(operation, computation, computations)
  return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


def _runs(
  entry: str, computations: dict[str, _Computation], *, into_fusions: bool = True
) -> Iterator[tuple[str, int]]:
  """Yields each call of a computation, with the number of times that it happens."""
  waiting = [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    yield name, times
    fused = {
      called
      for operation in computations[name].operations.values()
      if operation.opcode not in ("while", "call", "conditional", "async-start")
      for called in _CALLED.findall(operation.line)
    }
    for called, turns, condition in computations[name].calls:
      if called in fused and not into_fusions:
        continue
      # A loop without a known trip count runs from 0 to the constant of its condition.
      if turns is None:
        turns = computations[condition].constant
      waiting.append((called, times * turns))


def _parse(text: str) -> tuple[str, dict[str, _Computation]]:
  """Parses HLO text into (name of the entry computation, computations by name)."""
  entry, computation = "", _Computation()
  computations: dict[str, _Computation] = {}
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      entry = start[2] if start[1] else entry
      computation = computations[start[2]] = _Computation()
      continue
    operation = _OPERATION.match(line)
    if not operation:
      continue
    name, result, opcode = operation.groups()
    if constant := _CONSTANT.search(line):
      computation.constant = int(constant[1])
    if opcode in ("while", "fusion", "call", "async-start", "conditional"):
      trips, condition = _TRIPS.search(line), _CONDITION.search(line)
      turns = int(trips[1]) if trips else None if opcode == "while" else 1
      called = _CALLED.findall(line)
      if branches := _BRANCHES.search(line):
        called += [name.strip(" %") for name in branches[1].split(",")]
      for callee in called:
        computation.calls.append((callee, turns, condition[1] if condition else ""))
    arguments = line[operation.end() :].partition(")")[0]
    computation.operations[name] = _Operation(
      name,
      opcode,
      [_bytes(*array) for array in _ARRAY.findall(result)],
      _NAME.findall(arguments),
      line,
    )
  return entry, computations


def _without_repeats(
  computations: dict[str, _Computation],
) -> dict[str, _Computation]:
  """Leaves out collectives that have been seen.

  On TPUs, several fusions can belong to one collective, with one channel id.
  """
  seen: set[tuple[str, str]] = set()

  def is_new(operation: _Operation) -> bool:
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
  computation: _Computation, num_devices: int
) -> Iterator[tuple[str, float]]:
  """Yields (kind, bytes that a device sends) of the collectives of a computation."""
  for operation in computation.operations.values():
    kind = operation.opcode.removesuffix("-start")
    if kind in KINDS:
      # The result of a *-start lists operands, results and synchronization flags.
      is_start = operation.opcode.endswith("-start")
      size = max(operation.bytes) if is_start else sum(operation.bytes)
      yield kind, _sent(kind, size, _group_size(operation.line, num_devices))


def _kind(operation: _Operation) -> str:
  """The kind of a kernel, see `kernels`."""
  if operation.opcode == "fusion":
    return _NUMBERS.sub("", operation.name)
  if target := _TARGET.search(operation.line):
    return target[1]
  return operation.opcode


def _moved(
  operation: _Operation,
  computation: _Computation,
  computations: dict[str, _Computation],
) -> int:
  """Bytes that a kernel reads and writes."""
  operations = computation.operations
  sizes = [sum(operations[name].bytes) for name in operation.operands]
  written = sum(operation.bytes)
  body = None
  if operation.opcode == "fusion":
    body = computations[_CALLED.findall(operation.line)[0]]
  elif operation.opcode in (*_SLICES, "dynamic-update-slice"):
    if operation.opcode == "dynamic-update-slice":
      return 2 * sizes[1]
    return 2 * written
  if body is None:
    return sum(sizes) + written
  parts = _parts_read(body)
  read = sum(parts.get(i, size) for i, size in enumerate(sizes))
  return read + sum(_written(root, body) for root in _roots(body))


def _parts_read(body: _Computation) -> dict[int, int]:
  """Parameter of a fusion that is only sliced or updated in place -> bytes read."""
  found = {}
  for parameter in body.operations.values():
    if parameter.opcode != "parameter":
      continue
    uses = _uses(parameter.name, body)
    parts = [_part_read(use, name) for use, name in uses]
    if uses and None not in parts:
      number = int(parameter.line.partition(" parameter(")[2].partition(")")[0])
      found[number] = sum(part for part in parts if part is not None)
  return found


def _uses(name: str, body: _Computation) -> list[tuple[_Operation, str]]:
  """The operations that use a value, directly or by a bitcast of the second name."""
  found = []
  for operation in body.operations.values():
    if name in operation.operands:
      if operation.opcode == "bitcast":
        found += _uses(operation.name, body)
      else:
        found.append((operation, name))
  return found


def _part_read(use: _Operation, name: str) -> int | None:
  """Bytes that an operation reads of a value; None if it reads all of it."""
  if use.operands[0] != name or name in use.operands[1:]:
    return None
  if use.opcode in _SLICES:
    return sum(use.bytes)
  return 0 if use.opcode == "dynamic-update-slice" else None


def _roots(body: _Computation) -> list[_Operation]:
  """The operations whose results a fusion writes."""
  root = next(o for o in body.operations.values() if o.is_root)
  if root.opcode == "tuple":
    return [body.operations[name] for name in root.operands]
  return [root]


def _written(operation: _Operation, body: _Computation) -> int:
  """Bytes that a fusion writes for one of its results."""
  while operation.opcode == "bitcast":
    operation = body.operations[operation.operands[0]]
  if operation.opcode == "dynamic-update-slice":
    return sum(body.operations[operation.operands[1]].bytes)
  return sum(operation.bytes)


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
